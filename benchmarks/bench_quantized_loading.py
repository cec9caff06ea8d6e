"""Loading a quantised base: encoded while it is read, and from a folder that `sat-lora quantize` wrote.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_quantized_loading --gigabytes 0.6 --markdown

Makes a CogVLM of that size in bfloat16 and removes it afterwards; one process loads it whole, encoding it, and as it
was written, in turn. The page cache is warm. Seconds are of the processor, so that others on the machine count little;
the fastest of the repeats counts.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.model_folders import config_of, state_of
from benchmarks.report import table, write_json
from sat_lora.cogvlm.checkpoints.load import load_cogvlm, save_weights
from sat_lora.cogvlm.checkpoints.quantized_writer import quantize_base
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from sat_lora.quantization.config import NAMES, Quantization


def seconds_to_load(folder: Path, quantize: Quantization | None) -> tuple[float, float]:
    """(seconds of the processor, seconds on the clock) of one loading."""
    started = time.process_time(), time.monotonic()
    load_cogvlm(folder, dtype=torch.bfloat16, quantize=quantize)
    return time.process_time() - started[0], time.monotonic() - started[1]


def main(arguments: list[str] | None = None) -> list[dict]:
    """Make, load, print, and return one row per way to load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=3, help="of each, the fastest counts")
    parser.add_argument("--scheme", default=NAMES[0], choices=NAMES)
    parser.add_argument("--folder", type=Path, help="where to make the folders; the system's temporary folder")
    parser.add_argument("--out", type=Path, help="json file")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    args = parser.parse_args(arguments)
    init_model_parallel(init_distributed(alone=True))
    quantization = Quantization(scheme=args.scheme)
    with tempfile.TemporaryDirectory(dir=args.folder) as home:
        base, written = Path(home, "base"), Path(home, "written")
        config = config_of(args.gigabytes)
        save_weights(base, config, state_of(config))
        quantize_base(base, written, quantization)
        ways = {
            "whole": (base, None),
            f"encoded to {args.scheme} while it is read": (base, quantization),
            f"{args.scheme} as it was written": (written, None),
        }
        runs = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, settings in ways.items():
                runs[way].append(seconds_to_load(*settings))
        sizes = {way: sum(file.stat().st_size for file in folder.rglob("*.pt")) for way, (folder, _) in ways.items()}
    rows = [
        {"way": way, "bytes": sizes[way], "processor": min(run[0] for run in of), "clock": min(run[1] for run in of)}
        for way, of in runs.items()
    ]
    encoding = rows[1]
    cells = [
        [
            row["way"],
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['processor']:.2f}",
            f"{row['clock']:.2f}",
            f"{row['processor'] / rows[0]['processor']:.2f}",
            f"{row['processor'] / encoding['processor']:.3f}",
        ]
        for row in rows
    ]
    header = ["", "file MB", "processor s", "clock s", "processor s, of whole", "of encoding"]
    print(table(header, cells, args.markdown))
    if args.out:
        write_json({"gigabytes": args.gigabytes, "rows": rows}, args.out)
    return rows


if __name__ == "__main__":
    main()
