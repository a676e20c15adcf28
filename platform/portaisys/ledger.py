"""The ledger's entries as plain values: which of them stand, whether one was changed or removed, what they say.

Each entry carries the SHA-256 of the one before it. Two writers that read the same end of the chain both get a number; the lower one
stands, the other sees that it does not and writes again. The chain has no key: it shows changes and removals, not a rewrite of its
whole tail; who fears that notes the hash of its last entry elsewhere. Where entries are kept and who numbers them is registry.py's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from portaisys.spec import UserError

Row = tuple[int, str, str]  # number, text of the entry, its SHA-256 as written


@dataclass(frozen=True)
class Entry:
    """A line of the ledger. `previous`: SHA-256 of the line before, empty for the first; `nonce` tells equal events apart."""

    event: str
    name: str
    version: int | None
    who: str
    when: str
    because: str
    details: Mapping[str, Any]
    previous: str
    nonce: str


@dataclass
class Chain:
    """`entries`: those that stand, oldest first, with their SHA-256 as written; `problems`: what was changed or removed before one of them."""

    entries: list[tuple[str, Entry]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def hashes(self) -> list[str]:
        """SHA-256 of the entries that stand."""
        return [sha for sha, _ in self.entries]

    @property
    def end(self) -> str:
        """SHA-256 of the last one; empty when there is none."""
        return self.entries[-1][0] if self.entries else ""


def text_of(entry: Entry) -> str:
    """An entry as it is written and hashed."""
    return json.dumps(asdict(entry), sort_keys=True)


def sha256(text: str) -> str:
    """Of an entry's text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def chain_of(rows: Sequence[Row]) -> Chain:
    """The entries that stand, in order. One that follows an older entry than the last lost a race and does not stand."""
    chain = Chain()
    last, known = "", {""}
    for number, text, sha in rows:
        entry = _entry(text)
        if entry is None:
            chain.problems.append(f"entry {number} is not readable")
            continue
        if entry.previous != last and entry.previous in known:
            continue
        if entry.previous != last:
            chain.problems.append(f"the entry before {number} was changed or removed")
        if sha256(text) != sha:
            chain.problems.append(f"entry {number} was changed")
        chain.entries.append((sha, entry))
        last = sha
        known.add(sha)
    return chain


def verified(rows: Sequence[Row], head: str) -> str:
    """The hash of the last entry. `head`: what was noted as that. Raises UserError naming every changed or missing entry."""
    chain = chain_of(rows)
    problems = [*chain.problems, *_gaps([number for number, _, _ in rows])]
    if head and head not in chain.hashes:
        problems.append("its last entry was removed")
    if problems:
        raise UserError(f"ledger: {'; '.join(problems)}. Compare it with a backup of the registry's database")
    return chain.end


def version_before(entries: Sequence[Entry], now: int | None) -> int | None:
    """The version that was in production before `now`. A rollback steps down the pile of promotions, it does not add to it."""
    pile: list[int] = []
    for entry in entries:
        if entry.event == "promote" and entry.version is not None:
            pile.append(entry.version)
        while entry.event == "rollback" and entry.version in pile and pile[-1] != entry.version:
            pile.pop()
    while now in pile and pile.pop() != now:
        pass
    return pile[-1] if pile else None


def looked(entries: Sequence[Entry]) -> set[str]:
    """The digests that looks took to a test split."""
    return {digest for entry in entries if entry.event == "look" for key in ("candidates", "reused") for digest in entry.details[key]}


def looks_of(entries: Sequence[Entry], digests: Sequence[str]) -> tuple[int, ...]:
    """The counts that looks at a test split, whose entries these are, had come to when these candidates took them together: one each time
    they were judged.

    `digests`: those that never looked (data, weights, verdicts) are passed over, as are precisions written behind a candidate's digest.
    """
    looks = [entry for entry in entries if entry.event == "look"]
    each = [{digest.partition(" ")[0] for digest in looked([entry])} for entry in looks]
    mine = {*digests} & {digest for found in each for digest in found}
    return tuple(len(looked(looks[: index + 1])) for index, found in enumerate(each) if mine and mine <= found)


def _entry(text: str) -> Entry | None:
    try:
        return Entry(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _gaps(numbers: Sequence[int]) -> list[str]:
    return [f"entry {number} was removed" for number in sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers))]
