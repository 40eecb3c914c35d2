"""Hydra's sweepers and launchers: those that a sweep accepts, and the package of each."""

from __future__ import annotations

BASIC = "basic"
LAUNCHER, SWEEPER = "hydra/launcher", "hydra/sweeper"
OPTUNA = "optuna"
PACKAGES: dict[str, dict[str, str]] = {
    LAUNCHER: {
        "joblib": "hydra-joblib-launcher",
        "ray": "hydra-ray-launcher",
        "ray_aws": "hydra-ray-launcher",
        "submitit_local": "hydra-submitit-launcher",
        "submitit_slurm": "hydra-submitit-launcher",
    },
    SWEEPER: {OPTUNA: "hydra-optuna-sweeper"},
}


def missing_plugin(group: str, option: str) -> str | None:
    """Return a message for an option of Hydra's that is not installed or unknown; None for another
    group."""
    if group not in PACKAGES:
        return None
    known = PACKAGES[group]
    if option in known:
        return (
            f"{group}: given {option!r}, but its plugin is not installed. Install it: "
            f"pip install {known[option]}"
        )
    return (
        f"{group}: given {option!r}, but there is no such plugin. Expected one of: "
        f"{', '.join([BASIC, *known])}. Leave it out to make one run after another."
    )
