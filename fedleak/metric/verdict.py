"""The verdict of an audit: what the numbers mean, for who has to decide."""

from __future__ import annotations

from fedleak.metric.attribution import LayerLeak
from fedleak.metric.audit import Audit
from fedleak.wording import grade

#: Numerical uncertainty in dB beyond which a prediction says nothing.
_UNKNOWN = 5.0

LIMITS = (
    "This is a linearised prediction, for one honest-but-curious server that sees one update, "
    "knows how it was made and expects images as in the prior. Deep networks are often attacked "
    "less well than predicted; a server that changes the model, sees many updates or knows more "
    "of the images may recover more. It is no proof of safety."
)


def verdict(audit: Audit) -> str:
    """Return one paragraph in plain words: what leaks, where, what would help, and the limits."""
    psnr = audit.prediction.psnr_db
    each = "each image" if audit.batch_size == 1 else f"the {audit.batch_size} images of a batch"
    under = "without a defence" if audit.defence == "none" else f"under {audit.defence}"
    said = [
        f"From one update {under}, a server can be expected to recover {grade(psnr)}: "
        f"{psnr:.1f} dB for {each}, where {audit.prior_db:.1f} dB can be guessed without any "
        "update, above 40 dB nobody sees a difference, and under 14 dB little is left."
    ]
    error = audit.prediction.error_db
    if error > _UNKNOWN:
        said.append(f"But it is known to {error:.0f} dB alone: take it for no finding.")
    elif error:
        said.append(f"The number is known to about {error:.1f} dB.")
    if leak := worst(audit):
        said.append(
            f"Layer {leak.name} tells most: alone it gives {leak.alone_db:.1f} dB "
            f"({grade(leak.alone_db)}), and without it {leak.withheld_db:.1f} dB less are "
            "recovered."
        )
    said.append(_help(audit))
    return " ".join([*said, LIMITS])


def worst(audit: Audit) -> LayerLeak | None:
    """Return the layer whose absence costs an attacker most; of equals, which alone tells most."""
    if audit.attribution is None or not audit.attribution.layers:
        return None
    return max(audit.attribution.layers, key=lambda x: (round(x.withheld_db, 1), x.alone_db))


def _help(audit: Audit) -> str:
    target = audit.target_db
    if target is None:
        return "What would bring it under a target, --target DB says."
    if audit.prediction.psnr_db < target:
        return f"It is under the target of {target:g} dB as it is."
    if target <= audit.prior_db:
        return (
            f"Nothing brings it under {target:g} dB: {audit.prior_db:.1f} dB are guessed without "
            "any update."
        )
    enough = [a for a in audit.advice if a.reached]
    if enough:
        ways = "; or ".join(f"{a.what} ({a.predicted_psnr_db:.1f} dB)" for a in enough)
        return f"Under {target:g} dB come: {ways}."
    if audit.advice:
        best = min(audit.advice, key=lambda a: a.predicted_psnr_db)
        return (
            f"No single change that was tried brings it under {target:g} dB; the nearest is: "
            f"{best.what} ({best.predicted_psnr_db:.1f} dB)."
        )
    why = audit.why_no_attribution or "the update tells nothing that could be left out"
    return f"No change towards {target:g} dB was tried: {why}."
