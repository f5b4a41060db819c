"""Draws results.png from results.json: each server's CPU for each request as a ratio to nginx's, case by case."""

import json
import statistics
import sys
from pathlib import Path

import report

SHOWN = {"tarweb": "#1f6fb4", "nginx-tuned": "#57a55a", "lighttpd": "#b8b8b8"}   # http.server would be off the chart
HEIGHT = 0.26                  # of a bar, where a case has 1


def draw(directory):
    """Write results.png beside the results.json of `directory`; gives whether there was something to draw with."""
    try:
        import matplotlib
    except ImportError:
        print("no chart: matplotlib is not installed", file=sys.stderr)
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = json.loads((directory / "results.json").read_text())
    cases = [case for case in results["cases"].values() if report.valid(case, report.REFERENCE)
             and not case.get("bases")]
    if not cases:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.8 * len(cases)), layout="constrained")
    for index, server in enumerate(SHOWN):
        bars(axes, cases, server, (index - (len(SHOWN) - 1) / 2) * HEIGHT)
    frame(axes, cases)
    figure.savefig(directory / "results.png", dpi=130)
    pyplot.close(figure)
    return True


def bars(axes, cases, server, offset):
    """The bars of one server: the median, with a whisker from the least to the greatest round."""
    found = [(row, values) for row, case in enumerate(cases) if (values := report.ratios(case, server))]
    if not found:
        return
    middles = [statistics.median(values) for _, values in found]
    whiskers = [[middle - values[0] for middle, (_, values) in zip(middles, found, strict=True)],
                [values[-1] - middle for middle, (_, values) in zip(middles, found, strict=True)]]
    axes.barh([row + offset for row, _ in found], middles, HEIGHT, color=SHOWN[server], label=server,
              xerr=whiskers, error_kw={"ecolor": "#444444", "elinewidth": 1, "capsize": 2})
    for (row, values), middle in zip(found, middles, strict=True):
        axes.annotate(f"{middle:.2f}", (values[-1], row + offset), xytext=(5, 0), textcoords="offset points",
                      va="center", fontsize=8,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})


def frame(axes, cases):
    """Axes, the line that is nginx, and the words."""
    axes.axvline(1, color="#222222", linewidth=1.2, label="nginx")
    axes.set_yticks(range(len(cases)), [f"{case['title']}\nper {case['per']}" for case in cases], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, axes.get_xlim()[1] * 1.05)
    axes.set_xlabel("CPU time of the server, nginx = 1; less is better (median, whiskers from min to max)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.legend(loc="outside upper center", ncols=4, frameon=False)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
