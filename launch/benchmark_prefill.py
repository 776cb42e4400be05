"""Suite `prefill`: the time from a prompt to one new token of Hugging Face models, bf16 (fp32 on CPUs).

Models have the public shapes of Mistral-7B, Llama-3-8B and Phi-2 with random weights, or are a folder (`path=`).
Attention is Transformers' "eager", its "sdpa", ringflash on one GPU, and under torchrun ringflash with the prompt
sharded over all ranks; one GPU's work is then rank 0's, while the others wait. What is timed is what
`generate(max_new_tokens=1)` computes: one forward pass, logits of the last token, their largest; sharding the prompt
and telling every rank the token are part of it. No cache is kept. A figure is the median of `repeats` runs behind
WARM_UPS, the slowest rank's, by the host's clock with the device synchronised. Logits of ringflash are compared with
those of "sdpa": if the norm of the difference is more than a TOLERANCE of theirs, the command fails with it. What does
not fit a device is left out with its reason; where that is "sdpa", there is no difference to show.

`shrink=8` divides layers, widths and vocabulary by 8, so that the same code runs on CPUs in seconds; `cases=Phi` runs
the models with that word in their names.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor

from ringflash.launch.benchmark_device import Place, device_name, joined, lack_of_memory, synchronize, version_of
from ringflash.launch.benchmark_models import Model, PreTrainedModel, models
from ringflash.launch.benchmark_report import Report, Skipped
from ringflash.transformers import SequenceParallel
from ringflash.transformers.at_work import alone

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ringflash.launch.benchmark import Options

LENGTHS = (512, 1024, 2048, 32768)
REPEATS, WARM_UPS = 5, 2
ON_ONE = ("sdpa", "eager", "ring")
"""Values of `attn_implementation` that one GPU runs; the first is what the others are compared with."""
TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
"""Share of the logits' norm; or as much as "eager" differs from "sdpa", which also depends on the model's width: in
bf16, through 32 layers of width 1,024 by 2e-2, of width 4,096 by 1e-1."""


@dataclass(frozen=True)
class Row:
    """One measurement; `difference` is that of the last token's logits from "sdpa"'s, None where that did not run."""

    implementation: str
    model: str
    tokens: int
    milliseconds: float
    tokens_per_second: float
    difference: float | None


def measure(options: Options) -> Iterator[Report]:
    """Rows on rank 0 after every prompt, nothing elsewhere."""
    chosen = [model for model in models(options.path, options.shrink) if options.cases in model.name]
    with joined() as place:
        yield from _measure_all(chosen, place, options)


def _measure_all(chosen: list[Model], place: Place, options: Options) -> Iterator[Report]:
    settings = {
        "dtype": str(place.dtype).removeprefix("torch."),
        "ranks": place.ranks,
        "shrink": options.shrink,
        "transformers": version_of("transformers"),
        "tolerance": TOLERANCE[place.dtype],
    }
    report = Report([], "", settings)
    report.draw = functools.partial(draw, report)
    for model in chosen:
        for _ in _measure_model(model, place, options.tokens or LENGTHS, options.repeats or REPEATS, report):
            report.table = table(report)
            if place.rank == 0:
                yield report
        gc.collect()  # the model is in cycles, and the next one needs its memory


def _measure_model(
    model: Model, place: Place, lengths: tuple[int, ...], repeats: int, report: Report
) -> Iterator[None]:
    """Add a model's rows, or why there are none, to the report, prompt by prompt."""
    weights = model.weights() * place.dtype.itemsize * (place.ranks if place.device.type == "cpu" else 1)
    lacks = _of_all_ranks(lack_of_memory(weights, place.device), place)
    if reason := next(filter(None, lacks), None):
        advice = "" if model.path else "; shrink=8 makes it smaller"
        report.skipped.append(Skipped("all", model.name, f"for its weights {reason}{advice}"))
        yield
        return
    runs = Runs(model.name, model.build(place.device, place.dtype), place, repeats, report)
    for tokens in lengths if place.rank == 0 else ():
        runs.measure_alone(tokens)
        yield
    for tokens in lengths if place.ranks > 1 else ():
        runs.measure_shared(tokens)
        yield


def _of_all_ranks(value: str | None, place: Place) -> list[str | None]:
    values = [value] * place.ranks
    if place.ranks > 1:
        dist.all_gather_object(values, value)
    return values


class Runs:
    """What is measured of one model.

    Args:
        name: what it is called in tables.
        model: on the device of this place.
        place: where this process computes.
        repeats: runs that count.
        report: takes the rows.
    """

    def __init__(self, name: str, model: PreTrainedModel, place: Place, repeats: int, report: Report) -> None:
        self.name, self.model, self.place, self.repeats, self.report = name, model, place, repeats, report
        self.expected: dict[int, Tensor] = {}
        """By the prompt's length, the last token's logits (V,) under "sdpa"."""
        self.allowed = TOLERANCE[place.dtype]

    @torch.no_grad()
    def measure_alone(self, tokens: int) -> None:
        """Rows of what one device does with a prompt of so many tokens."""
        run = functools.partial(next_token, self.model, input_ids=self._prompt(tokens))
        for implementation in ON_ONE:
            self.model.set_attn_implementation(implementation)
            try:
                if implementation == "eager":
                    self._check_scores(tokens)
                with alone():
                    logits, milliseconds = _timed(run, self.repeats, Place(self.place.device))
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
                self.report.skipped.append(Skipped(implementation, f"{self.name} {tokens}", reason))
                continue
            if implementation == ON_ONE[0]:
                self.expected[tokens] = logits
            self._add(implementation, tokens, logits, milliseconds)

    @torch.no_grad()
    def measure_shared(self, tokens: int) -> None:
        """A row of what all ranks together do with a prompt of so many tokens."""
        self.model.set_attn_implementation("ring")
        run = functools.partial(_next_token_of_all, self.model, self._sequence, self._prompt(tokens))
        logits, milliseconds = _timed(run, self.repeats, self.place)
        if self.place.rank == 0:
            self._add(f"ring on {self.place.ranks}", tokens, logits, milliseconds)

    @functools.cached_property
    def _sequence(self) -> SequenceParallel:
        return SequenceParallel(self.model, partition="zigzag")  # rank 0 has the first tokens and the last

    def _prompt(self, tokens: int) -> Tensor:
        """Random token ids (1, T), the same on every rank."""
        generator = torch.Generator().manual_seed(tokens)
        vocabulary = self.model.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (1, tokens), generator=generator).to(self.place.device)

    def _check_scores(self, tokens: int) -> None:
        """Raise OutOfMemoryError where "eager" has no room for a layer's pairs: a CPU's process would be killed.

        It holds scores, masked scores, their softmax in fp32, and that rounded.
        """
        heads = self.model.config.get_text_config().num_attention_heads
        needed = heads * tokens**2 * (3 * self.place.dtype.itemsize + torch.float32.itemsize)
        if reason := lack_of_memory(needed, self.place.device):
            raise torch.OutOfMemoryError(f"for its scores {reason}")

    def _add(self, implementation: str, tokens: int, logits: Tensor, milliseconds: float) -> None:
        """A row, and a word where ringflash's logits are not those expected."""
        truth = self.expected.get(tokens)
        difference = None if truth is None else float((logits - truth).norm() / truth.norm())
        if implementation == "eager" and difference is not None:
            self.allowed = max(self.allowed, difference)
        self.report.rows.append(
            Row(implementation, self.name, tokens, milliseconds, tokens / milliseconds * 1e3, difference)
        )
        print(f"{implementation:12s} {self.name:18s} {tokens:6d} tokens {milliseconds:10.2f} ms", flush=True)
        if (
            implementation.startswith("ring") and difference is not None and not difference <= self.allowed
        ):  # or no number
            self.report.wrong.append(
                f'{implementation}, {self.name}, {tokens} tokens: logits differ from those of "sdpa" by '
                f"{difference:.2e} of their norm; allowed is {self.allowed:.1e}"
            )


def next_token(model: PreTrainedModel, **inputs: Any) -> tuple[int, Tensor]:
    """The likeliest token behind a prompt, and the logits (V,) that say so."""
    body, head = cast(Any, model.base_model), cast(Any, model.get_output_embeddings())
    logits = head(body(**inputs, use_cache=False).last_hidden_state[:, -1:])[0, -1]
    return int(logits.argmax()), logits


def _next_token_of_all(model: PreTrainedModel, sequence: SequenceParallel, ids: Tensor) -> tuple[int, Tensor]:
    """The same of a prompt that all ranks share: every rank knows the token, rank 0 the logits."""
    token, logits = next_token(model, **sequence.shard({"input_ids": ids}))
    known = torch.tensor(token, device=ids.device)
    dist.broadcast(known, 0)
    return int(known), logits


def _timed(run: Callable[[], tuple[int, Tensor]], repeats: int, place: Place) -> tuple[Tensor, float]:
    """Logits of a run, and the median milliseconds of the slowest rank."""
    for _ in range(WARM_UPS - 1):
        run()
    logits, times = run()[1].float(), []
    for _ in range(repeats):
        if place.ranks > 1:
            dist.barrier()
        synchronize(place.device)
        begin = time.perf_counter()
        run()
        synchronize(place.device)
        times.append((time.perf_counter() - begin) * 1e3)
    if place.ranks > 1:
        slowest = torch.tensor(times, device=place.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times = slowest.tolist()
    return logits, statistics.median(times)


# Table and picture


def table(report: Report) -> str:
    """A line for each model and length: milliseconds, and differences of logits."""
    names = _implementations(report)
    compared = [name for name in names if name != ON_ONE[0]]
    head = [f"{name}, ms" for name in names] + [f"{name}, diff" for name in compared]
    text = [f"{'model':18s} {'tokens':>7s} " + " ".join(f"{x:>15s}" for x in head)]
    lines: dict[tuple[str, int], dict[str, Row]] = {}
    for row in report.rows:
        lines.setdefault((row.model, row.tokens), {})[row.implementation] = row
    for (model, tokens), found in lines.items():
        cells = [f"{found[name].milliseconds:15.2f}" if name in found else f"{'-':>15s}" for name in names]
        differences = [found[name].difference if name in found else None for name in compared]
        cells += [f"{'-':>15s}" if x is None else f"{x:15.1e}" for x in differences]
        text.append(f"{model:18s} {tokens:7d} " + " ".join(cells))
    return "\n".join([*text, _conditions(report)])


def _implementations(report: Report) -> list[str]:
    """Those that there are figures of, from the plainest on."""
    return sorted({row.implementation for row in report.rows}, key=lambda name: (name.startswith("ring"), name))


def _conditions(report: Report) -> str:
    shrink = report.settings["shrink"]
    shapes = f", layers and widths divided by {shrink}: not the models' own figures" if shrink > 1 else ""
    ranks = f"{report.settings['ranks']} x " if report.settings["ranks"] > 1 else ""
    return f"{ranks}{device_name()}, {report.settings['dtype']}, one new token{shapes}"


def draw(report: Report, path: Path) -> None:
    """A panel for each model: bars of prompt tokens a second by length, with milliseconds above them."""
    shown, names = list(dict.fromkeys(row.model for row in report.rows)), _implementations(report)
    figure = Figure(figsize=(11, 3.3 * len(shown) + 0.8))
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for panel, model in zip(panels, shown, strict=True):
        _draw_panel(panel, [row for row in report.rows if row.model == model], names)
        panel.set_title(model)
    panels[0].legend(ncols=len(names), loc="upper left")
    panels[-1].set_xlabel("prompt tokens; above the bars: milliseconds to one new token")
    figure.suptitle(_conditions(report))
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def _draw_panel(panel: Axes, rows: list[Row], names: list[str]) -> None:
    lengths = sorted({row.tokens for row in rows})
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        found = {row.tokens: row for row in rows if row.implementation == name}
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(lengths))]
        heights = [found[n].tokens_per_second if n in found else 0 for n in lengths]
        bars = panel.bar(places, heights, width, color=f"C{number}", label=name)
        above = [f"{found[n].milliseconds:.3g}" if n in found else "left out" for n in lengths]
        panel.bar_label(bars, above, fontsize=7, padding=1)
    panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    panel.set_ylabel("prompt tokens / s")
    panel.set_ylim(0, 1.25 * panel.dataLim.ymax)
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
