"""Parsing: turns a composed config into a typed, checked one, with one form for equivalent settings.

Hydra composes plain YAML from ``conf/`` in struct mode, so a key that a group does not have is an error. Before any
work starts, `parse` turns the result into the dataclasses of `src.config.schema`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, cast, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from src.config import schema
from src.config.explain import explain_key, explain_type, explain_violation
from src.config.names import LABELS, method_name
from src.config.outside import settings_class
from src.config.renamed import modernised, objective_name
from src.config.schema import OBJECTIVES, SUPPORTS, Config
from src.config.secrets import refuse_secrets
from src.errors import UsageError

# For the groups whose options have settings of their own: the dataclass of each option, and that of one from outside.
GROUPS: dict[str, tuple[dict[str, Any], type]] = {
    "support": (SUPPORTS, schema.Support),
    "objective": (OBJECTIVES, schema.Objective),
}


def parse(composed: DictConfig) -> Config:
    """Turn a composed or a saved config into typed dataclasses, and check it.

    Raises:
        UsageError: a value has the wrong type or is out of range; the message names the key and the remedy.
    """
    composed = modernised(composed)
    try:
        for group, kind in get_type_hints(Config).items():
            if is_dataclass(kind) and not isinstance(value := composed.get(group, DictConfig({})), DictConfig):
                raise UsageError(
                    f"{group}={value}: holds several settings; give one, as {group}.{fields(kind)[0].name}"
                )
        support = kind_of("support", composed, *GROUPS["support"])
        objective = kind_of("objective", composed, *GROUPS["objective"])
        # A built-in method takes its name from a support set from outside, so that name is allowed too.
        own_name = str(OmegaConf.select(composed, "support.name"))
        method = kind_of("method", composed, dict.fromkeys([*LABELS, own_name], schema.Method), schema.Method)
        typed = _structured(support, objective, method)
        cfg: Config = _without_minus_zero(OmegaConf.to_object(OmegaConf.merge(typed, composed)))
    except OmegaConfBaseException as error:
        raise UsageError(explain_type(error)) from error
    _check_values("", cfg)
    refuse_secrets(cfg)
    _refuse_null_stem(composed, cfg.backbone)
    _check_combinations(cfg)
    return _canonical(cfg)


def parse_data(composed: DictConfig) -> schema.Data:
    """Parse only the data group of a config, because other groups may name packages that are not installed.

    Raises:
        UsageError: as in `parse`.
    """
    typed = OmegaConf.create({"data": OmegaConf.structured(schema.Data)})
    try:
        data: schema.Data = OmegaConf.to_object(OmegaConf.merge(typed, {"data": composed.data}))["data"]  # type: ignore
    except OmegaConfBaseException as error:
        raise UsageError(explain_type(error)) from error
    _check_values("data.", data)
    _check_data(data)
    return data


def chooses_data(composed: DictConfig) -> bool:
    """Whether a command on a finished run chooses a data set other than the run's own."""
    return "name" in composed.data


def chosen_data(composed: DictConfig, own: DictConfig) -> DictConfig:
    """The data group for a command on a finished run: the data set of ``data=``, or else the run's own.

    Another data set gets the image size of the run, unless the command gives one. If the run has ``data.keep``, the
    other images are then stored whole too, unless ``data.resize`` asks for something other than a crop.

    Args:
        composed: the config of the command.
        own: the run's data group; the command's ``data.root`` replaces its root, in case the images have moved.

    Raises:
        UsageError: the command changes another setting of the run's own images.
    """
    if chooses_data(composed):
        other = composed.data
        if other.image_size is not None:
            return other
        whole = own.get("keep") if other.get("resize", "crop") == "crop" else None
        sizes = {"image_size": own.image_size, "keep": other.keep or whole}
        return cast(DictConfig, OmegaConf.merge(other, sizes))
    chosen = {str(key): value for key, value in composed.data.items() if value is not None}
    if others := chosen.keys() - {"root"}:
        raise UsageError(f"data.{min(others)}: a run's own images stay as they are; choose others with data=... first")
    return cast(DictConfig, OmegaConf.merge(own, chosen))


def _check_values(key: str, cfg: Any) -> None:
    for place, node in _nodes(key, cfg):
        try:
            _adapter(node.__class__).validate_python({each.name: getattr(node, each.name) for each in fields(node)})
        except ValidationError as error:
            raise UsageError(explain_violation(place, error)) from None


@cache
def _structured(support: type, objective: type, method: type) -> DictConfig:
    """The typed schema of these parts, cached because making it takes longer than merging a config into a copy."""
    typed: DictConfig = OmegaConf.structured(Config)
    kinds = get_type_hints(Config) | {"support": support, "objective": objective, "method": method}
    for each in fields(Config):
        if is_dataclass(kind := kinds[each.name]):
            typed[each.name] = OmegaConf.structured(kind)
    return typed


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def kind_of(group: str, composed: DictConfig, own: dict[str, type], base: type) -> type:
    """The dataclass for a group's node: found by the node's name, or made from the signature of its ``_target_``."""
    node = composed.get(group)
    if not isinstance(node, DictConfig):
        raise UsageError(f"{group}={node}: choose one of {', '.join(map(str, own))}")
    if path := node.get("_target_"):
        return settings_class(path, group, base)
    name = str(node.get("name"))  # the user may have typed a list
    if name not in own:
        raise UsageError(f"{group}.name={name}: choose one of {', '.join(own)}")
    return own[name]


def _nodes(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Yield a config's dataclasses, each with its dotted key, which ends in a dot."""
    yield key, node
    for each in fields(node):
        if is_dataclass(value := getattr(node, each.name)):
            yield from _nodes(f"{key}{each.name}.", value)


def _without_minus_zero(value: Any) -> Any:
    """Replace -0.0 by 0.0: the two are equal, but are written differently and would be hashed differently."""
    if isinstance(value, float):
        return value + 0.0
    if isinstance(value, list):
        return [_without_minus_zero(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_minus_zero(each) for key, each in value.items()}
    if is_dataclass(value):
        for each in fields(value):
            setattr(value, each.name, _without_minus_zero(getattr(value, each.name)))
    return value


def _check_data(data: schema.Data) -> None:
    if data.keep is not None and data.keep < data.image_size:
        raise UsageError(
            f"data.keep={data.keep}: fewer pixels than data.image_size={data.image_size}; "
            "raise it, or leave data.keep=null"
        )
    if data.keep is not None and data.resize != "crop":
        raise UsageError(
            f"data.resize={data.resize}: data.keep={data.keep} stores whole images, of which evaluation sees "
            "the middle; leave data.resize=crop, or data.keep=null"
        )


def _check_combinations(cfg: Config) -> None:
    _check_support(cfg)
    _check_backbone(cfg)
    _check_objective(cfg)
    _check_data(cfg.data)
    _check_search(cfg)
    if cfg.epochs == 0 and cfg.init is None:
        raise UsageError("epochs=0: must be 1 or more, unless init=... names weights to evaluate as they are")
    if cfg.epochs == 0 and cfg.support.name != "none":
        raise UsageError(f"epochs=0: without training support={cfg.support.name} is not used; choose method=simclr")
    if cfg.tracking.system_metrics and cfg.tracking.name != "mlflow":
        raise UsageError(
            f"tracking.system_metrics=true: MLflow measures them, and tracking={cfg.tracking.name} has none; "
            "choose tracking=mlflow, or leave tracking.system_metrics=false"
        )


def _check_support(cfg: Config) -> None:
    support = cfg.support
    for key, owner in schema.SIZES.items():
        if getattr(cfg, key) is not None and not isinstance(support, owner):
            raise UsageError(explain_key(key))
        if getattr(cfg, key) is None and isinstance(support, owner):
            raise UsageError(f"{key}=null: support={support.name} needs a number of vectors")
    if not isinstance(support, schema.KMeans):
        return
    if cfg.k == 1 and isinstance(cfg.objective, schema.Contrast) and cfg.objective.same_prototype == "mask":
        raise UsageError("k=1: all images share the one prototype, so none would be a negative; choose 2 or more")
    if support.refit == "faiss" and cfg.k is not None and support.refit_window < cfg.k:
        raise UsageError(f"support.refit_window={support.refit_window}: must hold k={cfg.k} embeddings or more")


def _refuse_null_stem(composed: DictConfig, backbone: schema.Backbone) -> None:
    """Refuse one of our ResNets with a null in place of its stem; without the key it is the model of timm."""
    is_null = OmegaConf.select(composed, "backbone.stem", default="") is None
    if is_null and backbone.is_timm and backbone.name in schema.RESNETS:
        raise UsageError("backbone.stem=null: choose small, small_padded or large")


def _check_backbone(cfg: Config) -> None:
    backbone = cfg.backbone
    if backbone.options and backbone._target_ is None and not backbone.is_timm:
        raise UsageError(f"backbone.options={backbone.options}: {backbone.name} takes none; timm's models do")
    splits = f"backbone.bn_splits={backbone.bn_splits}: "
    if cfg.batch_size % backbone.bn_splits:
        raise UsageError(f"{splits}batch_size={cfg.batch_size} has no such equal parts; choose a divisor of it")
    if cfg.batch_size == backbone.bn_splits > 1:
        raise UsageError(f"{splits}parts of one image; choose fewer")


def _check_objective(cfg: Config) -> None:
    support, objective = cfg.support, cfg.objective
    is_ours = cfg.method._target_ is None
    if support.name != "none" and isinstance(objective, schema.Contrast) and not objective.support_weight and is_ours:
        raise UsageError(
            f"support={support.name}: objective.support_weight=0 makes no use of what is stored; "
            "choose objective=mixed, or support=none"
        )
    if cfg.evaluation.teacher and not (isinstance(objective, schema.MomentumTeacher) and is_ours):
        raise UsageError(
            f"evaluation.teacher=true: objective={objective.name} has no teacher; choose objective=teacher or "
            "objective=relation, or leave evaluation.teacher=false"
        )
    if isinstance(objective, schema.MNN) and is_ours and objective.neighbours > 1:
        few = f"objective.neighbours={objective.neighbours}: "
        size = cfg.k or cfg.queue_size or getattr(support, "size", None)  # of any type in a support set from outside
        if isinstance(size, int) and size < objective.neighbours:
            raise UsageError(f"{few}more than the {size} vectors that are stored; lower it")
        if cfg.search.name == "ivf":
            raise UsageError(f"{few}search=ivf finds one; choose search=auto, or objective.neighbours=1")


def _check_search(cfg: Config) -> None:
    if cfg.search.name != "ivf" or cfg.support.name == "none":
        return
    lists = {key: getattr(cfg.search, key) for key in ("index", "nprobe", "refresh_every")}
    if lacking := [key for key, value in lists.items() if value is None]:
        raise UsageError(f"search.{lacking[0]}=null: search=ivf needs a value; leave the setting out")
    if not isinstance(cfg.support, schema.Queue):
        raise UsageError(
            f"search=ivf: only support=queue can use it; choose search=auto for support={cfg.support.name}"
        )


def _canonical(cfg: Config) -> Config:
    """Give equivalent configs one form: ``queue_size=0`` becomes ``support=none``; a built-in method gets its name."""
    if isinstance(cfg.support, schema.Queue) and cfg.queue_size == 0:
        cfg.support, cfg.queue_size = schema.Support(name="none"), None
    if isinstance(cfg.objective, schema.Contrast):
        cfg.objective.name = objective_name(cfg.objective.support_weight, cfg.objective.predictor_hidden)
    if cfg.method._target_ is None:
        name = method_name(cfg.objective.name, cfg.support.name)
        cfg.method = schema.Method(name=name, label=cfg.support.label, colour=cfg.support.colour)
    return cfg
