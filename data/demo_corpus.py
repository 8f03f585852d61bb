"""Write a procedural corpus: python data/demo_corpus.py OUT --clips 300 --seconds 4. See vtok/data/synthetic.py."""

import argparse

from vtok.data.synthetic import LEVELS, write_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("out", help="folder for train/, val/ and captions.jsonl")
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first clip")
    parser.add_argument("--seconds", type=float, nargs="+", default=[4.0], help="one length, or shortest and longest")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 128], metavar=("H", "W"))
    parser.add_argument("--fps", type=float, default=12)
    parser.add_argument("--complexity", type=int, nargs=2, default=[0, len(LEVELS) - 1], metavar=("LOW", "HIGH"))
    parser.add_argument("--val-fraction", type=float, default=0.1)
    parser.add_argument("--shots", type=int, help="shots of each clip; by level when left out")
    parser.add_argument("--needles", type=int, help="needle inserts of each clip; 0 or 1 when left out")
    parser.add_argument("--needle-shapes", type=int, default=1, help="shapes of each needle, one a frame")
    parser.add_argument("--questions-per-type", type=int, default=1)
    parser.add_argument("--map-size", type=int, nargs=2, metavar=("H", "W"), help="a dense map beside each clip")
    parser.add_argument("--map-dtype", default="uint8", help="uint8, float16 or float32")
    parser.add_argument("--workers", type=int, help="processes; one a core when left out")
    options = vars(parser.parse_args())
    seconds = options["seconds"]
    if len(seconds) > 2:
        parser.error(f"--seconds takes one length or two, got {len(seconds)}")
    options["seconds"] = seconds[0] if len(seconds) == 1 else tuple(seconds)
    options["map_size"] = tuple(options["map_size"]) if options["map_size"] else None
    options["size"], options["complexity"] = tuple(options["size"]), tuple(options["complexity"])
    print(write_corpus(options.pop("out"), **options))


if __name__ == "__main__":
    main()
