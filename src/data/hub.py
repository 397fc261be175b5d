"""Data sets of the Hugging Face hub, downloaded by ``huggingface_hub``, which keeps them in its own cache.

A data set is downloaded when it is decoded, so a run whose images are already decoded needs no network.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path, PurePath

from src.config.schema import Data
from src.data.decoding import Contents, Source
from src.data.parquet import lacking, parquet, shards_of_splits
from src.data.roles import TEST, used_splits
from src.errors import UsageError
from src.system.redact import one_line

logger = logging.getLogger(__name__)

CONVERTED = "refs/convert/parquet"  # the revision in which the hub keeps its own conversion of a data set to parquet


def hub(cfg: Data) -> Source:
    """The source of the parquet shards of ``data.repo`` at ``data.revision``, or else of the hub's conversion.

    The network is not used before the images are decoded. A branch that has moved since then is therefore not noticed.

    Raises:
        UsageError: ``data.repo`` is not set.
    """
    if not cfg.repo:
        raise UsageError("data.repo is not set: data=hub needs data.repo=OWNER/NAME, as in the data set's address")

    @cache  # with data.on_error=skip the source is read twice
    def shards() -> Path:
        return download(cfg)

    def read() -> Contents:
        columns, folder = (cfg.image_column, cfg.label_column), shards()  # whose name is the commit
        contents = parquet(folder, *columns, cfg.config, cfg.train_split, cfg.test_split).read()
        return contents._replace(commit=folder.name)

    return Source(f"hub {cfg.repo} {cfg.revision}", read)


def download(cfg: Data) -> Path:
    """Download the shards of the splits that have a role, unless they are there, and return the folder that holds them.

    Raises:
        UsageError: the hub cannot be reached and its cache lacks shards, access is refused, or there is no such data
            set, revision, configuration or split.
    """
    from huggingface_hub import HfApi, errors

    repo, where = str(cfg.repo), f"data.repo={cfg.repo}"
    try:
        revision, shards = _shards(repo, cfg.revision)
        splits = shards_of_splits(shards, cfg.config)
        wanted = [str(each) for split in used_splits(splits, cfg.train_split, cfg.test_split) for each in splits[split]]
        logger.info("%s: fetching %d files, unless they are in the cache of huggingface_hub", where, len(wanted))
        return Path(HfApi().snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=wanted))
    except UsageError:
        raise
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{where}: access has to be asked for on its page; then set HF_TOKEN, or type: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{where}: has no data.revision={cfg.revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(f"{where}: no such data set, or a private one without its HF_TOKEN") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{where}: not of the form OWNER/NAME") from error
    except Exception as error:  # the exception that the library raises without a network depends on its release
        return _downloaded_before(repo, cfg, error)


def _shards(repo: str, revision: str | None) -> tuple[str | None, list[PurePath]]:
    """The first revision with parquet files (the wanted one, or the hub's conversion), and the paths of these files.

    Raises:
        UsageError: there are none.
    """
    from huggingface_hub import HfApi, errors

    for each in [revision] if revision else [None, CONVERTED]:
        try:
            files = HfApi().dataset_info(repo, revision=each).siblings or []
        except errors.RevisionNotFoundError:
            if each != CONVERTED:
                raise
            break
        if shards := [PurePath(file.rfilename) for file in files if file.rfilename.endswith(".parquet")]:
            return each, shards
    raise UsageError(f"data.repo={repo}: holds no parquet files, and the hub has converted it to none")


def _downloaded_before(repo: str, cfg: Data, problem: Exception) -> Path:
    """The folder with all wanted shards in the library's own cache, for use without a network.

    Raises:
        UsageError: the cache lacks some of them, or may lack the whole test split.
    """
    from huggingface_hub import HfApi

    for each in [cfg.revision] if cfg.revision else [None, CONVERTED]:
        try:
            # No pattern: the folder itself, even if it lacks files that are not wanted.
            snapshot = HfApi().snapshot_download(
                repo, repo_type="dataset", revision=each, allow_patterns=[], local_files_only=True
            )
        except (OSError, ValueError):
            continue
        folder = Path(snapshot)
        listed = _listed_before(repo, each)
        splits = shards_of_splits(
            listed or (path.relative_to(folder) for path in folder.rglob("*.parquet")), cfg.config
        )
        names = used_splits(splits, cfg.train_split, cfg.test_split) if splits else []
        wanted = {name: splits[name] for name in names}
        is_here = all((folder / shard).is_file() for shards in wanted.values() for shard in shards)
        if not wanted or not is_here or (not listed and lacking(wanted)):
            continue
        if not listed and TEST not in wanted and cfg.test_split is None:
            raise UsageError(
                f"data.repo={repo}: the hub cannot be reached, and nothing tells whether the data set has more splits "
                f"than those downloaded ({', '.join(wanted)}); connect to a network, or use just these: "
                f"data=parquet data.root={folder}"
            )
        logger.warning("data.repo=%s: the hub cannot be reached; what was downloaded before is used", repo)
        return folder
    raise UsageError(
        f"data.repo={repo}: not downloaded, and the hub cannot be reached ({one_line(problem)}); connect to a network, "
        f"or type where there is one: hf download --repo-type dataset {repo}"
    ) from problem


def _listed_before(repo: str, revision: str | None) -> list[PurePath]:
    """The paths of all parquet files that a revision had when it was downloaded, whether they are here or not.

    Empty if there is no such list, as older releases of the library kept none.
    """
    try:
        from huggingface_hub import get_cached_repo_tree

        files = get_cached_repo_tree(repo, repo_type="dataset", revision=revision)
    except Exception:  # the one for "no list" is as new as the function
        return []
    return [PurePath(file.path) for file in files if file.path.endswith(".parquet")]
