"""Does the cost model predict real devices? Published measurements against it, row by row.

    python -m bench.devices [ROWS.csv]

Prints predicted over measured for each row (1.20: a fifth too much), and the spread by metric: of the rows on which
figures of the model were fitted, and of those that it had not seen. Rows of a file of your own are all of the second
kind; the columns are those of `sim/time/devices/measurements.csv`. A row of a device or quantity that the model does
not know counts as missed.
"""

from __future__ import annotations

import argparse

from untether.sim.time.devices.measured import CHECK, FIT, WITHIN, Measurement, by_metric, read_measurements

WHAT = {FIT: "figures were fitted on these rows", CHECK: "not used for any figure"}


def show(rows: list[Measurement]) -> None:
    """Prints every row, then the spreads."""
    print(f"{'part':6}{'metric':9}{'predicted':>10}{'measured':>10}{'unit':>9}{'ratio':>7}  device, model, setting")
    for row in rows:
        predicted, ratio = row.predicted(), row.ratio
        said, off = ("none", "") if predicted is None or ratio is None else (f"{predicted:.4g}", f"{ratio:.2f}")
        where = row.profile.name if row.profile else f"{row.device} (not catalogued)"
        print(f"{row.part:6}{row.metric:9}{said:>10}{row.value:10.4g}{row.unit[:8]:>9}{off:>7}", end="  ")
        print(f"{where}, {row.model} {row.quantisation} {row.runtime}, {row.setting}")
    for part in (FIT, CHECK):
        own = [row for row in rows if row.part == part]
        if own:
            print(f"\n{part}: {WHAT[part]}")
            print(f"{'metric':9}{'rows':>5}{'median error':>14}{'spread':>8}{f'within {WITHIN}':>12}")
            for metric, found in by_metric(own).items():
                print(f"{metric:9}{found.rows:5}{found.error:14.2f}{found.spread:8.2f}{found.within:12.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", default="", help="CSV of measurements; default: those of the project")
    show(read_measurements(parser.parse_args().rows))


if __name__ == "__main__":
    main()
