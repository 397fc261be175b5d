"""``hydra/launcher=ray``: each job of a sweep is run by a detached actor of Ray, which outlives the command.

Ray's own jobs (``ray job submit``) are not used, because such a job fails if it finds no room within 15 minutes.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from src.errors import UsageError
from src.sweeps.cluster import ClusterLauncher, JobState, SchedulerSilent
from src.sweeps.worker import Work
from src.system.environment import PROJECT

NAMESPACE = "support-sets"


class JobActor:
    """The actor of a job, which ends together with the job's process and so frees what it has reserved."""

    def __init__(self, work: Work) -> None:
        import ray

        self.work = work
        self.work.start()
        self.itself: Any = ray.get_runtime_context().current_actor
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        self.work.wait()
        self.itself.__ray_terminate__.remote()

    def stop(self) -> None:
        """Tell the job to save and stop."""
        self.work.stop()


class RayLauncher(ClusterLauncher):
    """Submits jobs to a Ray cluster.

    Args:
        jobs: how many are submitted at a time; None: all of them, of which Ray starts as many as it has room for.
        ray: ``init``, the arguments of ``ray.init``, and ``remote``, the resources that each job reserves.
    """

    engine, package, extra = "Ray", "ray", "ray"
    ask_seconds = 3.0

    def __init__(self, jobs: int | None, ray: DictConfig) -> None:
        self.at_a_time = jobs
        self.options: Any = OmegaConf.to_container(ray, resolve=True)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Join the cluster."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        import ray

        search = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        runtime = {"env_vars": {"PYTHONPATH": os.pathsep.join(search)}}
        try:
            ray.init(
                namespace=NAMESPACE,
                runtime_env=runtime,
                log_to_driver=False,
                logging_level="error",
                **self.options["init"],
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"hydra.launcher.ray.init: {reason}; is a cluster running (ray start --head)?") from None
        self._refuse_impossible()

    def submit(self, work: Mapping[str, Work]) -> Sequence[str]:
        """Start an actor for each job, whose name is the path of the job's log."""
        import ray

        actor: Any = ray.remote(JobActor)
        ids = []
        for each in work.values():
            options = {"name": str(each.log), "lifetime": "detached", "max_restarts": 0, **self.options["remote"]}
            try:
                ids.append(actor.options(**options).remote(each)._actor_id.hex())
            except ValueError as error:  # another actor has the name
                raise UsageError(f"hydra/launcher=ray: {' '.join(str(error).split())}") from None
        return ids

    def _refuse_impossible(self) -> None:
        """Raise a `UsageError` if no node of the cluster has what a job reserves, because it would wait for ever."""
        import ray

        remote = self.options["remote"]
        wanted = {"CPU": remote.get("num_cpus") or 0, "GPU": remote.get("num_gpus") or 0}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(key, 0) >= wanted[key] for key in wanted) for node in nodes):
            there = " or ".join(f"{node.get('CPU', 0):g} cores and {node.get('GPU', 0):g} GPUs" for node in nodes)
            raise UsageError(
                f"hydra.launcher.ray.remote: no node has num_cpus={wanted['CPU']} and num_gpus={wanted['GPU']}; "
                f"they have {there}"
            )

    def unrecorded(self, logs: Collection[Path]) -> Mapping[Path, str]:
        """Find the ids by the names of the living actors."""
        actors = _actors() if logs else []
        return {Path(actor.name): actor.actor_id for actor in actors if actor.name and actor.state != "DEAD"}

    def job_states(self, ids: Collection[str]) -> Mapping[str, JobState]:
        """Ask Ray for the states of the actors."""
        return {actor.actor_id: _job_state(actor) for actor in _actors() if actor.actor_id in ids}

    def cancel(self, job_id: str) -> None:
        """Do nothing: jobs that can never start have been refused before."""

    def how_to_stop(self, ids: Sequence[str]) -> str:
        """The command that calls the actors' method ``stop``, on which a job saves."""
        logs = [str(self._file(each.job, "log")) for each in self.submitted if each.id in ids]
        return f"python -m src.sweeps.ray_jobs {' '.join(logs)}"


def _actors() -> Sequence[Any]:
    """The actors of this project in the cluster, dead or alive.

    Raises:
        SchedulerSilent: Ray does not answer.
    """
    from ray.util.state import list_actors

    try:
        found: Sequence[Any] = list_actors(filters=[("ray_namespace", "=", NAMESPACE)], detail=True, limit=10_000)
    except Exception as error:
        raise SchedulerSilent(f"Ray does not answer ({' '.join(str(error).split())[:200]})") from None
    return found


def _job_state(actor: Any) -> JobState:
    if actor.state == "ALIVE":
        return JobState("runs", f"on node {actor.node_id[:8]}")
    if actor.state != "DEAD":
        return JobState("waits", "for room")
    cause: dict[str, Any] = next(iter((actor.death_cause or {}).values()), {})
    message = str(cause.get("error_message", "its actor is dead"))
    return JobState("is gone", " ".join(message.split())[:200])


def main(logs: Sequence[str]) -> None:
    """``python -m src.sweeps.ray_jobs LOG...``: tell the jobs that write these files to save and stop."""
    import ray

    try:
        ray.init("auto", namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    except ConnectionError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    states = {actor.name: actor.state for actor in _actors() if actor.state != "DEAD"}
    for log in logs:
        name = str(Path(log).resolve())
        if name not in states:
            print(f"{log}: Ray has no such job")
        elif states[name] == "ALIVE":
            ray.get(ray.get_actor(name).stop.remote())
            print(f"{log}: told to save and stop")
        else:
            ray.kill(ray.get_actor(name))
            print(f"{log}: had not started, and is no longer waiting")


if __name__ == "__main__":
    main(sys.argv[1:])
