"""Operations a second that devices do at most, by their names."""

__all__ = ["PEAK_FLOPS"]

# Dense bfloat16 operations a second of one device, by the manufacturers' data sheets.
PEAK_FLOPS = {
    "a100": 312e12,
    "h100": 989e12,
    "h100-pcie": 756e12,
    "h200": 989e12,
    "b200": 2250e12,
    "l4": 121e12,
    "l40s": 362e12,
    "rtx-4090": 165e12,
}
