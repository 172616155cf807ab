"""What ``kernels.py`` measured, as markdown and as a plot."""

from __future__ import annotations

from textwrap import fill

FORWARD = "forward"


def markdown(runs):
    """The tables of all runs of a file; rows of a backend that was measured twice are those of the later run."""
    lines = [item for run in runs for item in (_heading(run["environment"]), "")]
    rows = [row for run in runs for row in run["rows"]]
    for build in (_times, _ratios, _costs, _paddings, _memories, _failures):
        found = build(rows)
        if found:
            lines += [*found, ""]
    return "\n".join(lines)


def _heading(found):
    versions = ", ".join(f"{name} {item}" for name, item in found["versions"].items())
    cudnn = f", cuDNN {found['cudnn']}" if found.get("cudnn") else ""
    return f"{found['date']}, {found['device']}, {found['dtype']}, Python {found['python']}{cudnn}, {versions}."


def _table(title, header, body):
    if not body:
        return []
    rule = "| --- |" + " ---: |" * (len(header) - 1)
    return [title, "", *(_line(item) for item in [header]), rule, *(_line(item) for item in body)]


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def _ordered(items):
    return list(dict.fromkeys(items))


def _name(row):
    return row["shape"] if row["case"] == FORWARD else f"{row['shape']}, with backward"


def _of(rows, section, **wanted):
    return [
        row for row in rows if row["section"] == section and all(row.get(key) == item for key, item in wanted.items())
    ]


def _grid(rows, column, shown):
    """Rows by shape and case, columns by what ``column`` says; the later of two."""
    columns = _ordered(column(row) for row in rows)
    cells = {}
    for row in rows:
        cells.setdefault(_name(row), {})[column(row)] = shown(row)
    return columns, [[name, *(found.get(item, "") for item in columns)] for name, found in cells.items()]


def _times(rows):
    rows = [row for row in _of(rows, "time", who="attn") if "backend" in row]
    columns, body = _grid(rows, lambda row: f"`{row['backend']}`", lambda row: _number(row, "tflops", "{:.0f}"))
    return _table("Kernel time through attn, as TFLOP/s:", ["shape (B, S, H, D)", *columns], body)


def _number(row, key, form):
    return form.format(row[key]) if key in row else "-"


def _ratios(rows):
    found = []
    for who, title in (("library", "over the library called by hand"), ("seed", "over the dispatcher of diffusers")):
        compared = [row for row in _of(rows, "time", who=who) if "attn_over_this" in row]
        columns, body = _grid(
            compared, lambda row: f"`{row['backend']}`", lambda row: _number(row, "attn_over_this", "{:.3f}")
        )
        table = _table(f"Kernel time of attn {title}, ratio:", ["shape (B, S, H, D)", *columns], body)
        found += [*table, ""] if table else []
    return found[:-1]


def _costs(rows):
    measured = [row for row in _of(rows, "cpu") if "microseconds" in row]
    taken = {}
    for row in measured:
        taken.setdefault(row["backend"], {})[row["who"]] = row["microseconds"]
    body = []
    for name, found in taken.items():
        cells = [f"{found[who]:.1f}" if who in found else "-" for who in ("library", "plan", "attn", "seed")]
        over = [f"{found[who] - found['library']:+.1f}" if "library" in found else "-" for who in ("plan", "attn")]
        body.append([f"`{name}`", *cells, *over])
    header = [
        "backend",
        "library by hand",
        "plan()",
        "attention()",
        "diffusers",
        "plan() over library",
        "attention() over it",
    ]
    return _table("CPU time of a tiny call (1, 16, 2, 64), microseconds:", header, body)


def _paddings(rows):
    measured = {(_name(row), row["who"], row["backend"]): row for row in _of(rows, "padding") if "ms" in row}
    body = [
        [
            name, f"`{backend}`" if who == "attn" else f"SDPA, {backend}, dense mask",
            f"{row['ms']:.3f}", _number(row, "dense_over_this", "{:.2f}"),
        ]
        for (name, who, backend), row in measured.items()
    ]  # fmt: skip
    header = ["shape (B, S, H, D)", "call", "ms", "x faster than the best dense masked call"]
    return _table("Key padding, half of all keys hidden:", header, body)


def _memories(rows):
    rows = _of(rows, "memory")
    measured = [row for row in rows if "peak_bytes" in row]
    if not measured:
        return []
    columns = _ordered(row["mask"] for row in rows)
    cells = {}
    for row in rows:
        shown = f"{row['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row else "-"
        label = f"`{row['backend']}`" if row["case"] == FORWARD else f"`{row['backend']}`, with backward"
        cells.setdefault(label, {})[row["mask"]] = shown
    body = [[name, *(found.get(item, "") for item in columns)] for name, found in cells.items()]
    dense, result = (measured[0][key] / 2**20 for key in ("dense_bool_bytes", "result_bytes"))
    title = (
        f"Most memory of a call beside its inputs, its result included, MiB, at {measured[0]['shape']}; the result is "
        f"{result:.1f}, a dense bool (Sq, Skv) would be {dense:.1f}, in bf16 {2 * dense:.1f}:"
    )
    return _table(title, ["backend", *columns], body)


def _failures(rows):
    found = {}
    for row in rows:
        if "error" in row:
            key = ", ".join(str(row[key]) for key in ("section", "backend") if key in row), row["error"]
            parts = ", ".join(str(row[key]) for key in ("who", "case", "mask") if key in row)
            found.setdefault(key, []).append(parts)
    lines = [f"- {of} ({'; '.join(_ordered(parts))}): {error}" for (of, error), parts in found.items()]
    return ["What was not measured:", "", *lines] if lines else []


def draw(runs, path):
    """Bars of TFLOP/s by shape, one colour for each backend: forward above, with the backward below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for run in runs for row in run["rows"]]
    rows = [row for row in _of(rows, "time", who="attn") if "tflops" in row]
    cases = _ordered(row["case"] for row in rows)
    backends = _ordered(row["backend"] for row in rows)
    colours = dict(zip(backends, plt.get_cmap("tab20").colors, strict=False))
    figure, axes = plt.subplots(len(cases), 1, figsize=(14, 4.2 * len(cases)), squeeze=False)
    for axis, case in zip(axes[:, 0], cases, strict=True):
        _bars(axis, _of(rows, "time", case=case), backends, colours)
        axis.set_title(f"{case}, TFLOP/s", loc="left")
    axes[0, 0].legend(
        ncols=min(len(backends), 6), fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(0, 1.32)
    )
    figure.suptitle(
        f"{runs[0]['environment']['device']}, {runs[0]['environment']['dtype']}, through attn", x=0.01, ha="left"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _bars(axis, rows, backends, colours):
    shapes = _ordered(row["shape"] for row in rows)
    width = 0.85 / len(backends)
    for number, name in enumerate(backends):
        found = {row["shape"]: row["tflops"] for row in rows if row["backend"] == name}
        places = [place + (number - len(backends) / 2 + 0.5) * width for place in range(len(shapes))]
        axis.bar(places, [found.get(shape, 0) for shape in shapes], width, label=name, color=colours[name])
    axis.set_xticks(range(len(shapes)), [fill(shape, 14) for shape in shapes])
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
