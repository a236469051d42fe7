"""Whether the best setting lies inside of what was tried, and the learning rate to try next if it does not."""

from collections.abc import Collection

from .trial import Trial


def edges(tried: Collection[Trial], best: Trial) -> dict[str, str]:
    """Which of the best rate and ratio are at an end of what was tried, where a better one may lie beyond.

    A single learning rate counts, since it was not tuned; a single lambda is the user's choice.

    >>> trials = [Trial(rate, 4.0, 16.0, 8) for rate in (1e-4, 1e-3, 1e-2)]
    >>> edges(trials, trials[2]), edges(trials, trials[1]), edges(trials[:1], trials[0])
    ({'learning_rate': 'largest'}, {}, {'learning_rate': 'only one'})
    """
    found = {}
    for name in ("learning_rate", "lr_ratio"):
        values, value = {getattr(trial, name) for trial in tried}, getattr(best, name)
        if len(values) == 1 and name == "learning_rate":
            found[name] = "only one"
        elif len(values) > 1 and value in (min(values), max(values)):
            found[name] = "largest" if value == max(values) else "smallest"
    return found


def beyond(tried: Collection[Trial], best: Trial) -> Trial | None:
    """The best setting with the next learning rate beyond those tried, if its own is the smallest or largest.

    It is away by the mean factor between those tried, but at least by 2, and has three digits.

    >>> trials = [Trial(rate, 4.0, 16.0, 8) for rate in (1e-4, 5e-4, 2.5e-3)]
    >>> beyond(trials, trials[2]).learning_rate, beyond(trials, trials[0]).learning_rate, beyond(trials, trials[1])
    (0.0125, 2e-05, None)
    >>> beyond([Trial(rate, 1.0, 16.0, 8) for rate in (1e-4, 1.1e-4)], Trial(1.1e-4, 1.0, 16.0, 8)).learning_rate
    0.00022
    """
    rates = {trial.learning_rate for trial in tried}
    step = {"largest": 1, "smallest": -1}.get(edges(tried, best).get("learning_rate", ""))
    if step is None:
        return None
    factor = max(2.0, (max(rates) / min(rates)) ** (1 / (len(rates) - 1)))
    return best._replace(learning_rate=float(f"{best.learning_rate * factor**step:.3g}"))
