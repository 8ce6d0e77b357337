"""What a page shows, as plain values: no tensors, no open files, nothing of the run but its results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Histogram:
    """Counts of several populations over common bins.

    Attributes:
        edges: ``bins + 1`` ascending edges.
        counts: Population to ``bins`` counts.
        overflow: True if the last bin also holds everything beyond its right edge.
    """

    edges: list[float]
    counts: dict[str, list[int]]
    overflow: bool = False


@dataclass(frozen=True)
class Quantiles:
    """Mean and quantiles of a population, None of an empty one."""

    name: str
    size: int
    mean: float | None
    low: float | None
    median: float | None
    high: float | None


@dataclass(frozen=True)
class MixLine:
    """One value of a metadata field.

    Attributes:
        value: The value as text.
        selected: Records of the coreset with it.
        coreset_share: Their share of the coreset.
        pool_share: Share of the pool with it.
        wanted: A target example has it.
    """

    value: str
    selected: int
    coreset_share: float
    pool_share: float
    wanted: bool


@dataclass(frozen=True)
class Mix:
    """The coreset against the pool by one metadata field.

    Attributes:
        field: Its dotted name.
        lines: The values, most selected first.
        rest: Values that are not shown.
    """

    field: str
    lines: list[MixLine]
    rest: int


@dataclass(frozen=True)
class TokenClass:
    """One fingerprint.

    Attributes:
        token_id: Its vocabulary id.
        text: Its text.
        mass: Summed saliency over the targets.
        count: Occurrences in scope.
        idf: Inverse document frequency over the targets.
        group: The target group whose bank it is in.
    """

    token_id: int
    text: str
    mass: float
    count: int
    idf: float
    group: str = ""


@dataclass(frozen=True)
class Occurrence:
    """The target token of a class that weighs most: where it stands and what is around it."""

    target: str
    place: int
    saliency: float
    before: str
    text: str
    after: str


@dataclass(frozen=True)
class TargetView:
    """One target example, token by token.

    Attributes:
        id: Its id.
        texts: Text of each token; ``""`` continues the character of the token before.
        row: Row signal, None outside the scope; likewise the next two.
        column: Column signal.
        saliency: The weight alpha.
        clipped: Tokens that are left out at the end.
    """

    id: str
    texts: list[str]
    row: list[float | None]
    column: list[float | None]
    saliency: list[float | None]
    clipped: int = 0


@dataclass(frozen=True)
class MatchView:
    """One candidate, token by token.

    Attributes:
        texts: As in `TargetView`.
        similarity: Penalised similarity, None outside the scope; likewise the next two.
        match: Vocabulary id of the matched class.
        direct: True where that is the token's own class.
        group: The target group it was matched with.
        clipped: Tokens that are left out at the end.
        alignment: How far a step for each response token would go for the targets, None elsewhere; empty from methods
            that do not ask.
    """

    texts: list[str]
    similarity: list[float | None]
    match: list[int | None]
    direct: list[bool | None]
    group: str = ""
    clipped: int = 0
    alignment: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class Candidate:
    """A pool record with its score.

    Attributes:
        row: Place in the pool.
        id: Its id.
        rank: 1 is the best; None if unscored.
        score: None if unscored; the next three also for methods without such parts.
        mean: Mean similarity.
        max: Highest similarity.
        coverage: Share of directly matched tokens.
        num_tokens: Content tokens.
        selected: In the coreset.
        turns: Role and text of each turn.
        fields: Short metadata fields.
        view: Its tokens, if they are shown.
        parts: What the score is a weighted sum of, by name; empty from most methods.
    """

    row: int
    id: str
    rank: int | None
    score: float | None
    mean: float | None
    max: float | None
    coverage: float | None
    num_tokens: int
    selected: bool
    turns: list[tuple[str, str]] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)
    view: MatchView | None = None
    parts: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class FileLink:
    """A file of the run, by its name relative to the page."""

    name: str
    meaning: str
    size: int


@dataclass(frozen=True)
class SelectionFacts:
    """All of a selection's report.

    Attributes:
        title: What the run is called.
        manifest: Content of ``manifest.json``.
        budget: The budget in words.
        cut: Score of the last record that was picked.
        scores: Distribution of the scores.
        lengths: Distribution of the lengths.
        length_quantiles: Their quantiles.
        score_quantiles: Quantiles of the scores.
        coverage_quantiles: Quantiles of the coverage; empty for methods without one.
        mixes: One for each metadata field that can be counted.
        mix_sample: Pool records that the shares were counted on.
        classes: The heaviest fingerprints.
        num_classes: All fingerprints.
        occurrences: Vocabulary id (with ``<group>/`` before it if there are groups) to its heaviest target token.
        class_texts: Vocabulary id to text, for the classes that candidates were matched with.
        targets: Target examples by token; empty for methods without saliency.
        num_targets: All target examples.
        top: Best candidates.
        borderline: Those around the cut.
        bottom: The last ones.
        coreset: The selected records, best first, as many as a page can hold.
        command: The command that repeats the run, if it is known.
        files: The run's files.
    """

    title: str
    manifest: dict[str, Any]
    budget: str
    cut: float | None
    scores: Histogram | None
    lengths: Histogram | None
    length_quantiles: list[Quantiles]
    score_quantiles: list[Quantiles]
    coverage_quantiles: list[Quantiles]
    mixes: list[Mix]
    mix_sample: int
    num_targets: int
    top: list[Candidate]
    borderline: list[Candidate]
    bottom: list[Candidate]
    coreset: list[Candidate]
    command: str | None
    files: list[FileLink]
    classes: list[TokenClass] = field(default_factory=list)
    num_classes: int = 0
    occurrences: dict[str, Occurrence] = field(default_factory=dict)
    class_texts: dict[int, str] = field(default_factory=dict)
    targets: list[TargetView] = field(default_factory=list)
