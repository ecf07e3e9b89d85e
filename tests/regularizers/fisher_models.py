"""Small models with every layer and every way of holding samples, and their data."""

import torch
from torch import nn
from torch.nn import functional


def randomised(model, dtype=torch.float64):
    """Draw every parameter and running statistic anew, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0, generator=generator)
            elif name.endswith("running_mean"):
                buffer.normal_(generator=generator)
    return model.to(dtype)


def images(n=5, channels=4, size=(8, 7), dtype=torch.float64):
    return torch.randn(n, channels, *size, dtype=dtype), torch.arange(n) % 3


def sequences(n=5, length=6, width=4, dtype=torch.float64):
    return torch.randn(n, length, width, dtype=dtype), torch.randint(3, (n, length))


class Mean(nn.Module):
    """Mean over all but the first two dimensions, and a head."""

    def __init__(self, channels):
        super().__init__()
        self.head = nn.Linear(channels, 3)

    def forward(self, x):
        return self.head(x.flatten(2).mean(2).tanh())


def conv2d(**options):
    arguments = {"kernel_size": 3, "bias": True} | options
    return nn.Sequential(nn.Conv2d(4, 6, **arguments), nn.ReLU(inplace=True), Mean(6)), images()


def conv1d(**options):
    x, y = images(size=(9,))
    return nn.Sequential(nn.Conv1d(4, 6, 3, **options), nn.Tanh(), Mean(6)), (x, y)


class PositionFirst(nn.Module):
    """Samples in the second dimension, as recurrent layers and torch's transformers have them."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Flattened(nn.Module):
    """Positions and samples in one dimension."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return self.inner(x.reshape(-1, 4)).view(*x.shape[:2], 3)


class Reused(nn.Module):
    """One layer three times, its bias included, and a norm twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.layer(x).tanh())
        return self.head(self.layer(self.norm(self.layer(x).tanh())))


class Frames(nn.Module):
    """Images of a video in one dimension with the samples."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.stack((x, x.flip(-1), 2 * x), 1).flatten(0, 1)  # (N 3, C, H, W)
        x = self.norm(self.conv(x)).tanh().mean((2, 3))
        return self.head(x.view(-1, 3, 6).mean(1))


class PartlyFrozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen, self.unused = nn.Linear(4, 5).requires_grad_(False), nn.Linear(2, 2)
        self.weightless, self.head = nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        return self.head(self.weightless(self.frozen(x).tanh()))


class Padded(nn.Module):
    """An embedding whose padding row has no gradient, with ids that repeat."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4, padding_idx=2), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.embedding(ids))


class Positions(nn.Module):
    """A position embedding with one of three shapes of its input."""

    def __init__(self, how):
        super().__init__()
        self.how, self.position, self.norm = how, nn.Embedding(6, 4), nn.LayerNorm(4)
        self.scale, self.head = nn.Linear(1, 4), nn.Linear(4, 3)

    def forward(self, x):
        ids = torch.arange(6)
        if self.how == "leading":
            ids = ids[None]
        elif self.how == "expanded":
            ids = ids.expand(len(x), 6)
        x = x + self.norm(self.position(ids))
        return self.head(x.tanh() * self.scale(torch.ones(1, 1, 1, dtype=x.dtype)))


class Vision(nn.Module):
    """A class token and a position embedding that the model adds by itself."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(4, 5, (4, 3), stride=(4, 3))
        self.token, self.position = (
            nn.Parameter(torch.ones(1, 1, 5)),
            nn.Parameter(torch.ones(1, 8, 5)),
        )
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(1, 2))

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        x = self.norm(x + self.position[:, : x.shape[1]]).tanh()
        return self.head((x + self.token).prod(1))


class Elsewhere(nn.Module):
    """Uses a weight outside of the layer that owns it, too: no hook sees that."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(functional.linear(self.layer(x).tanh(), self.layer.weight))


MODELS = {
    "vision": lambda: (Vision(), images()),
    "mlp": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
                    (torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3)),
    "rms": lambda: (nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.Linear(5, 3)), sequences()),
    "layer-norm-of-two-dimensions": lambda: (
        nn.Sequential(nn.Linear(4, 3), nn.LayerNorm((6, 3)), nn.Linear(3, 3)), sequences()),
    "conv": conv2d,
    "conv-stride-padding-dilation": lambda: conv2d(stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    "conv-groups": lambda: conv2d(groups=2, bias=False),
    "conv-same": lambda: conv2d(kernel_size=(3, 5), padding="same"),
    "conv-circular": lambda: conv2d(padding=1, padding_mode="circular"),
    "conv1d": lambda: conv1d(stride=2, padding=1),
    "conv1d-dilation-groups": lambda: conv1d(dilation=2, groups=2, padding="same"),
    "norms-of-images": lambda: (
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.GroupNorm(3, 6), nn.Tanh(),
                      Mean(6)), images()),
    "position-first": lambda: (PositionFirst(), sequences()),
    "flattened": lambda: (Flattened(), sequences()),
    "reused": lambda: (Reused(), sequences()),
    "frames": lambda: (Frames(), images()),
    "partly-frozen": lambda: (PartlyFrozen(), sequences()),
    "padding-row": lambda: (Padded(), (torch.randint(3, (5, 6)), torch.randint(3, (5, 6)))),
    "positions": lambda: (Positions("flat"), sequences()),
    "positions-as-many-as-samples": lambda: (Positions("flat"), sequences(n=6)),
    "positions-leading": lambda: (Positions("leading"), sequences()),
    "positions-expanded": lambda: (Positions("expanded"), sequences()),
}  # fmt: skip
