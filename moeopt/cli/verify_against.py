"""``moeopt verify DIR --against FILE``: what got worse since a certificate was stored."""

from __future__ import annotations

import json
from pathlib import Path

from moeopt.limits import LoadLimits


def verify_against(bundle: Path, provider: str | None, against: Path, as_json: bool, limits: LoadLimits) -> bool:
    """Print the check and the differences; whether both are good. A bundle without golden runs is not."""
    from moeopt.testing import check_bundle

    check = check_bundle(bundle, provider, against, limits)
    worse = check.regressions
    if as_json:
        body = {
            "certificate": json.loads(check.certificate.to_json()),
            "against": str(against),
            "regressions": [regression.to_dict() for regression in worse],
        }
        print(json.dumps(body, indent=2, allow_nan=False))
    else:
        how = f"{len(worse)} figure{'s' * (len(worse) > 1)} worse" if worse else "nothing is worse"
        print(check.certificate)
        print(f"\nagainst {against}: {how}")
        for regression in worse:
            print(f"  {regression}")
    return check.certificate.passed is True and not worse
