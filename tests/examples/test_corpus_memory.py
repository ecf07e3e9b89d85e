"""Texts much larger than what is held at a time are read, tokenised and drawn from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT_BYTES = 96 << 20
MOST_BYTES = 48 << 20  # pieces, groups, shards and pyarrow's batches; a whole text would be 96

# A peak never falls, so every kind of source has a process of its own. The one of getrusage would
# be that of the process which started it, if that was higher.
MEASURE = """
import json, sys
from pathlib import Path
import torch
from corpus import batch, prepare_corpus, table_files, validation_windows
table_files._CSV_BLOCK_BYTES = 1 << 18

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

source, column, cache = sys.argv[1], sys.argv[2] or None, Path(sys.argv[3])
torch.randperm(10)
small = Path(source).with_name("small" + Path(source).suffix)
for path in (small, source):  # the small one loads the libraries
    before = status("VmRSS")
    corpus = prepare_corpus(
        str(path), column=column, cache=cache, sequence_len=64, shard_tokens=4 << 20
    )
    for step in range(4):
        batch(corpus.train, stream="s", step=step, batch_size=16, sequence_len=4096)
    validation_windows(corpus.validation, 64, 16)
print(json.dumps([status("VmHWM") - before, len(corpus.train) + len(corpus.validation)]))
"""

WRITE = """
import sys
import pyarrow as pa, pyarrow.csv as pa_csv, pyarrow.parquet as pq
kind, path, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
line = "".join(f"word{i} " for i in range(200))
rows = [f"{i} {line}" for i in range(1000)]
table = pa.table({"text": rows})
once = sum(map(len, rows))
times = size // once + 1
if kind == "txt":
    with open(path, "w") as file:
        for _ in range(times):
            file.writelines(rows)
elif kind == "csv":
    pa_csv.write_csv(pa.concat_tables([table] * times), path)
else:  # one row group, as large on the disk as in memory
    options = {"compression": "none", "use_dictionary": False, "row_group_size": 10**9}
    pq.write_table(pa.concat_tables([table] * times), path, **options)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured by Linux's /proc")
@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, kind: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples"), "OMP_NUM_THREADS": "1"}
    for name, size in (("small", 1 << 20), ("large", TEXT_BYTES)):
        command = (sys.executable, "-c", WRITE, kind, tmp_path / f"{name}.{kind}", str(size))
        subprocess.run(command, env=environment, check=True)
    column = "" if kind == "txt" else "text"
    done = subprocess.run(
        (sys.executable, "-c", MEASURE, tmp_path / f"large.{kind}", column, tmp_path / "cache"),
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    grown, tokens = map(int, done.stdout.strip("[]\n").split(","))
    assert tokens >= TEXT_BYTES
    assert grown < MOST_BYTES
