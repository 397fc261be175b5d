"""The presets of the cluster launchers in conf/ compose; tests/sweeps/test_cluster.py tests the SLURM launcher itself.

``make clusters`` tries them on a real SLURM and a real Ray.
"""

import pytest


@pytest.mark.parametrize(
    ("launcher", "override", "says"),
    [
        (
            "slurm",
            "hydra.launcher.partition=gpu",
            {"SlurmLauncher", "gpus_per_node: 1", "partition: gpu", "mem_gb: 32"},
        ),
        ("slurm_cpu", "jobs=4", {"SlurmLauncher", "gpus_per_node: null", "mem_gb: 8", "timeout_min: 720"}),
        ("ray", "jobs=4", {"RayLauncher", "num_gpus: 1", "jobs: ${jobs}"}),
        (
            "ray_cpu",
            "hydra.launcher.ray.remote.num_cpus=2",
            {"RayLauncher", "num_gpus: 0", "num_cpus: 2", "address: auto"},
        ),
    ],
)
def test_a_preset_composes(command, launcher, override, says):
    done = command("src.train", f"hydra/launcher={launcher}", override, "--cfg", "hydra", "--package", "hydra.launcher")
    assert done.returncode == 0, done.stderr
    assert all(each in done.stdout for each in says), done.stdout
