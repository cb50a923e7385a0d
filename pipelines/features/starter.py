"""The ctr.yaml that ``sluice init`` writes: every guess under the reason for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipelines.features.guess import Proposal


def to_yaml(proposal: Proposal, *, name: str | None = None) -> str:
    """Return a ``ctr.yaml`` in which every guess stands under the reason for it."""
    spec, source, rows = proposal.spec, proposal.source, proposal.source.rows
    seen = f"{proposal.sample:,} rows" if rows == proposal.sample else f"the first {proposal.sample:,} rows"
    total = f" of {rows:,}" if rows not in (None, proposal.sample) else ""
    data: dict[str, Any] = {"source": source.name, "path": str(source.path)}
    if source.options:
        data["options"] = source.options
    split, why = _split(proposal)
    lines = [
        f"# Guessed by sluice init from {seen}{total} of {_plain(str(source.path))}. Check the guesses, then:",
        "#   sluice features -c ctr.yaml    fit and encode",
        "#   sluice train -c ctr.yaml       train, evaluate, register",
        "# Every key is explained by: sluice config reference",
        f"name: {_inline(name or _slug(source.path))}",
        "data:",
        *(f"  {key}: {_inline(value)}" for key, value in data.items()),
        f"  # {why}",
        f"  split: {_inline(split)}",
        "features:",
    ]
    for role, value in {
        "label": spec.label,
        "user": spec.user,
        "item": spec.item,
        "timestamp": spec.timestamp,
    }.items():
        lines.append(f"  # {_plain(proposal.remarks[role])}")
        lines.append(f"  {role}: {_inline(value)}" if value is not None else f"  # {role}:")
    lines += ["  # Length of an embedding vector; a column may name its own dim.", f"  dim: {spec.dim}"]
    if spec.keep:
        lines += [f"  # {_plain(g.name)}: {_plain(g.why)}" for g in proposal.guesses if g.use == "keep"]
        lines.append(f"  keep: {_inline(list(spec.keep))}")
    lines.append("  columns:")
    for g in proposal.guesses:
        if g.column is not None:
            tree = g.column.model_dump(mode="json", exclude_defaults=True) | {"kind": g.column.kind}
            if g.column.encode is not None:
                tree["encode"] = {"how": g.column.encode.how} | tree.get("encode", {})
            lines += [f"    # {_plain(g.why)}", f"    - {_inline(tree)}"]
    left = [g for g in proposal.guesses if g.use == "left out"]
    if left:
        lines.append("  # Left out:")
        lines += [f"  #   {_plain(g.name)}: {_plain(g.why)}" for g in left]
    batch = 4096 if (rows or proposal.sample) >= 200_000 else 512
    lines += [
        "# lr, dnn, deepfm, dualmlp, finalmlp, dcnv2 and gdcn come with Sluice.",
        "model: {name: finalmlp}",
        "# At most so many passes over the training rows; training stops when AUC on valid stops rising.",
        f"train: {{epochs: 10, batch_size: {batch}}}",
    ]
    return "\n".join(lines) + "\n"


def _split(proposal: Proposal) -> tuple[dict[str, Any], str]:
    if proposal.source.given:
        return {"by": "given"}, "The folder has train, valid and test."
    if proposal.spec.timestamp is not None:
        return {"by": "time"}, "The oldest 80 % of the rows train, the next 10 % validate, the newest test."
    return {"by": "random"}, "80 %, 10 % and 10 % at random, since no column tells the time."


def _inline(value: Any) -> str:
    """YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()


def _plain(text: str) -> str:
    """Text that can't break out of a comment."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text).split())


def _slug(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:60] or "clicks"
