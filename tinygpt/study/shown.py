"""What each study found, as a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tinygpt.study.attention import CAUTION, HeadScores, entropies
from tinygpt.study.attribution import Attribution
from tinygpt.study.explain import Explanation
from tinygpt.study.heads import LeftOut
from tinygpt.study.induction import Induction
from tinygpt.study.inside import Inside
from tinygpt.study.lens import Lens
from tinygpt.study.norms import EVERY, KINDS, STEPS, Norms, Trained
from tinygpt.study.predictions import Predictions
from tinygpt.study.proofs import TOLERANCE, Proof
from tinygpt.study.report import BLANK, Chart, Map, Part, Report, Table, plain_data
from tinygpt.tokenizer.tokenizer import Tokenizer


def piece(tokenizer: Tokenizer, token: int) -> str:
    """A token as it is shown: in quotes, so that its spaces are seen.

    Bytes that are only a part of a character are written as in \\xf0.
    """
    text = tokenizer.token_bytes(int(token)).decode(errors="backslashreplace")
    return '"' + text.replace("\n", "\\n").replace("\t", "\\t") + '"'


def tokens_report(found: Predictions, tokenizer: Tokenizer) -> Report:
    """Of each token how well it was foreseen, and what was thought likelier."""
    most = found.likeliest.shape[1]
    columns = ("piece", "id", "nats", "bits", "rank", "entropy", *["likeliest", "p"] * most)
    rows = []
    for i, token in enumerate(found.ids):
        foreseen = [
            value
            for other, p in zip(found.likeliest[i], found.probability[i], strict=True)
            for value in ((piece(tokenizer, other), p) if i else ("", None))
        ]
        loss = found.loss[i]
        rank = found.rank[i] if i else None
        row = [piece(tokenizer, token), token, loss, loss / math.log(2), rank, found.entropy[i]]
        rows.append([*row, *foreseen])
    note = "the first token has nothing before it, from which it could be foreseen"
    if len(found.ids) > 1:
        mean = np.nanmean(found.loss)
        note = f"mean loss {mean:.4f} nats, {mean / math.log(2):.4f} bits a token; {note}"
    result = plain_data(found)
    result["rank"][0], result["likeliest"][0] = None, [None] * most
    return Report("How well each token was foreseen", [Table("", columns, rows, note)], result)


def lens_report(found: Lens, inside: Inside, tokenizer: Tokenizer, position: int) -> Report:
    """What each place of the model would write behind one token of the text."""
    before = piece(tokenizer, inside.ids[position])
    mean = found.loss.mean(-1) if found.loss.shape[-1] else [None] * len(found.places)
    rows = [
        [
            place,
            piece(tokenizer, found.likeliest[i, position]),
            found.probability[i, position],
            found.rank[i, position],
            found.divergence[i, position],
            mean[i],
        ]
        for i, place in enumerate(found.places)
    ]
    columns = ("after", "would write", "p", "rank", "KL", "mean loss")
    title = f"What follows token {position % len(inside.ids)}, {before}, if the model ended there"
    note = (
        "rank: where the token stands that the whole model finds likeliest; KL in nats, from the "
        "whole model's distribution; mean loss over all tokens of the text"
    )
    return Report("When the model decides", [Table(title, columns, rows, note)], found)


def attention_report(
    inside: Inside, scores: HeadScores, block: int | None, head: int | None
) -> Report:
    """All heads in a line each, or those of one block, or those of one number."""
    wide = (
        entropies(inside.attention) if len(inside.ids) > 1 else np.full(scores.first.shape, np.nan)
    )
    rows = [
        [i, h, *(kind[i, h] for kind in kinds_of(scores)), wide[i, h]]
        for i, h in np.ndindex(scores.previous.shape)
        if block in (None, i) and head in (None, h)
    ]
    columns = ("block", "head", "previous", "first", "duplicate", "induction", "entropy")
    note = (
        "shares on random tokens given twice, of which a head that reads all alike gives "
        f"{scores.chance:.3f}; entropy on this text, 1 for reading all alike; {CAUTION}"
    )
    result = {"scores": scores, "entropy": wide}
    return Report("Where the heads read", [Table("", columns, rows, note)], result)


def map_report(inside: Inside, tokenizer: Tokenizer, block: int, head: int) -> Report:
    """Where one head reads in the text."""
    read = inside.attention[block, head]
    drawn = _map(f"block {block}, head {head}", read, inside, tokenizer)
    return Report("Where a head reads", [drawn], read)


def _map(title: str, values: np.ndarray, inside: Inside, tokenizer: Tokenizer) -> Map:
    names = [piece(tokenizer, token) for token in inside.ids]
    return Map(title, values, names, f"blank is below {BLANK} in a terminal; {CAUTION}")


def rollout_report(flow: np.ndarray, inside: Inside, tokenizer: Tokenizer, block: int) -> Report:
    """How much of each token reaches every place through the blocks up to one."""
    through = "block 0" if block == 0 else f"blocks 0 to {block}"
    drawn = _map(f"Attention rollout through {through}", flow[block], inside, tokenizer)
    return Report("What may flow where", [drawn], flow)


def heads_report(scores: HeadScores, found: LeftOut, windows: int, by: str) -> Report:
    """The heads' kinds, and what each is worth.

    Args:
        by: what stood in the place of a head's output.
    """
    rows = [
        [
            i,
            h,
            *(kind[i, h] for kind in kinds_of(scores)),
            found.without[i, h],
            found.error[i, h],
            "yes" if found.matters[i, h] else "none",
        ]
        for i, h in np.ndindex(found.without.shape)
    ]
    kinds = ("previous", "first", "duplicate", "induction")
    columns = ("block", "head", *kinds, "loss without", "+-", "effect")
    note = (
        f"the loss of all is {found.loss:.4f} nats; loss without: how much higher it is when the "
        f"head's output is {by}, over {windows} windows, with its standard error, below two of "
        f"which is no effect; chance for a share is {scores.chance:.3f}; the second copy of the "
        f"random tokens costs {scores.gain:.3f} nats less than the first"
    )
    result = {"scores": scores, "left_out": found}
    return Report("Which heads matter", [Table("", columns, rows, note)], result)


def attribution_report(
    found: Attribution, tokenizer: Tokenizer, token: int, against: int | None
) -> Report:
    """The components of a logit, the largest first, and their sum."""
    order = np.argsort(-np.abs(found.values))
    rows: list[list[object]] = [[found.components[i], float(found.values[i])] for i in order]
    rows += [["sum", float(found.values.sum())], ["the model's own", found.logit]]
    name = piece(tokenizer, token)
    other = "" if against is None else f" over {piece(tokenizer, against)}"
    note = (
        "what each part adds to the logit itself; what it says to later parts, which then add to "
        "the logit, is counted as theirs"
    )
    table = Table("", ("part", "logit"), rows, note)
    return Report(f"What speaks for {name}{other}", [table], found)


def kinds_of(scores: HeadScores) -> Sequence[np.ndarray]:
    """The four shares, in the order in which they are shown."""
    return scores.previous, scores.first, scores.duplicate, scores.induction


def explain_report(found: Explanation) -> Report:
    """A row an operation, and the totals."""
    numbers, formulas = list[list[object]](), list[list[object]]()
    for each in found.operations:
        name = each.name.removeprefix("blocks.")
        name = f"block {name}" if name.isdigit() else name
        shapes = " x ".join(map(str, each.given)), " x ".join(map(str, each.gives))
        measured = each.rms, each.lowest, each.highest, each.similarity
        numbers.append([name, *shapes, each.parameters, each.flops, *measured])
        formulas.append([name, each.formula, each.source])
    numbers.append(["total", None, None, found.parameters, found.flops, *[None] * 4])
    columns = (
        "operation", "in", "out", "parameters", "FLOPs", "RMS", "min", "max", "similarity",
    )  # fmt: skip
    note = (
        f"{len(found.ids)} tokens; RMS, min and max of what comes out; similarity: the mean cosine "
        "between two tokens' vectors; --block N opens a block"
    )
    parts: list[Part] = [
        Table("", columns, numbers, note),
        Table("Their formulas, and where they are", ("operation", "formula", "source"), formulas),
    ]
    return Report("What each operation does", parts, found)


def induction_report(found: Induction) -> Report:
    """The losses of both copies and the heads' scores, which change together, or do not."""
    curves = {
        "first copy": [*zip(found.steps, found.first.tolist(), strict=True)],
        "second copy": [*zip(found.steps, found.second.tolist(), strict=True)],
    }
    shares = {
        "previous token, block 0": [float(each.previous[0].max()) for each in found.scores],
        "induction, block 1": [float(each.induction[1].max()) for each in found.scores],
    }
    heads = {name: [*zip(found.steps, each, strict=True)] for name, each in shares.items()}
    last, out = found.scores[-1], found.left_out
    rows: list[list[object]] = [
        [i, h, last.previous[i, h], last.induction[i, h], out.without[i, h], out.error[i, h]]
        for i, h in np.ndindex(out.without.shape)
    ]
    columns = ("block", "head", "previous", "induction", "loss without", "+-")
    verdict = (
        "a head of block 1 reads what followed the same token before"
        if found.found
        else "no head is on that diagonal, so if the second copy is foreseen, it is in another way"
    )
    block, head = np.unravel_index(out.without.argmax(), out.without.shape)
    verdict += (
        f". Left out alone, block {block} head {head} costs the most, "
        f"{out.without[block, head]:.2f} nats a token: a score is not an explanation"
    )
    parts: list[Part] = [
        Chart("Loss of two copies of random tokens, nats", curves, "step"),
        Chart("The highest share that a head gives", heads, "step", verdict),
        Table("Each head at the end", columns, rows, f"chance for a share is {last.chance:.3f}"),
    ]
    return Report("How copying is learnt", parts, found)


def norms_report(found: Norms) -> Report:
    """What became of each cell, and what was measured on its way."""
    columns = ("layer norm", "init", "blocks", "rate", "warm-up", "seed", "loss", "verdict")
    rows: list[list[object]] = [
        [*each.cell[:3], str(each.cell.rate), *each.cell[4:], each.result,
         each.verdict(found.unigram)]
        for each in found.trained
    ]  # fmt: skip
    note = (
        f"loss: the mean of the last 20 of {STEPS}, in nats; guessing each token by its frequency "
        f"costs {found.unigram:.4f}, by the token before {found.bigram:.4f}. stuck: within 0.05 of "
        "the first; learns: 0.3 below it; diverged: not finite. What is stuck may come free, at a "
        "step that is up to chance, so that seeds can differ"
    )
    parts: list[Part] = [Table("What became of each", columns, rows, note), _at_the_start(found)]
    deepest = [each for each in found.trained if each.cell.depth == 12 and each.cell.seed == 0]
    for setting in sorted({_setting(each) for each in deepest}):
        same = {each.cell.kind: each for each in deepest if _setting(each) == setting}
        parts.append(_losses(found, same, "{}, {}, warm-up {}".format(*setting)))
    return Report("Layer norms, shortcuts and warm-up", parts, found)


def _setting(trained: Trained) -> tuple[str, float, int]:
    return trained.cell.init, trained.cell.rate, trained.cell.warmup


def _losses(found: Norms, same: dict[str, Trained], setting: str) -> Chart:
    """The losses of twelve blocks, in means of 25 steps, beside what two guesses cost."""
    curves = {
        kind: [
            (step + EVERY / 2, mean)
            for step in range(0, len(same[kind].losses), EVERY)
            if np.isfinite(mean := float(np.mean(same[kind].losses[step : step + EVERY])))
        ]
        for kind in KINDS
        if kind in same
    }
    curves = {kind: curve for kind, curve in curves.items() if curve}  # of one that diverged
    for name, loss in (("by frequency", found.unigram), ("by the token before", found.bigram)):
        curves[name] = [(0.0, loss), (float(STEPS), loss)]
    return Chart(f"Loss of 12 blocks: {setting}", curves, "step")


def _at_the_start(found: Norms) -> Table:
    """What is measured of each shape before any step."""
    rows, seen = list[list[object]](), set[tuple]()
    for each in found.trained:
        if (shape := each.cell[:3]) not in seen:
            seen.add(shape)
            last = each.gradients[0][-1]
            measured = (last[-1], each.norms[0][-1], each.similarity[0][-1], each.rank[0][-1])
            rows.append([*shape, *measured])
    columns = ("layer norm", "init", "blocks", "gradient", "residual", "similarity", "rank")
    note = (
        "gradient: the length of that of the last block's c_proj, the mean of 8 batches; residual: "
        "the mean length of its vectors behind the last block; similarity: the mean cosine of two "
        "of them, 1 where all tokens are alike; rank: what is not their mean, of the whole. Their "
        "authors disagree on what causes what: these are the measures"
    )
    return Table("Before the first step", columns, rows, note)


def proofs_report(proofs: list[Proof], no_sum: str | None) -> Report:
    """How far apart two ways to the same numbers are.

    Args:
        no_sum: why a logit is no sum of its parts, where that is so.
    """
    columns = ("claim", "found", "differs by", "of")
    rows = [
        [each.claim, "holds" if each.holds else "DOES NOT HOLD", each.difference, each.scale]
        for each in proofs
    ]
    note = (
        "differs by: the largest difference; of: the largest of the numbers; it holds up to "
        f"{TOLERANCE:g} of that"
    )
    if no_sum:
        note += f". The logits of this model are no sum of its parts: {no_sum}"
    result = [{**vars(each), "holds": each.holds} for each in proofs]
    return Report("That what is shown adds up", [Table("", columns, rows, note)], result)
