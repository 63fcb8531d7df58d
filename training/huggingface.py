"""Hugging Face's config.json ↔ ModelConfig.

What a config.json means is what the class of the installed `transformers` says it means: absent keys have the class's
defaults, old spellings are its business, and what it refuses is refused here. Without `transformers` a file is read with the
defaults written in huggingface_families.py (a test holds them against the classes), and one with a key that is not known
there is refused.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import model_components  # noqa: F401  registers what a model can be made of
from model_config import ModelConfig, resolve
from training.huggingface_families import FAMILIES
from training.huggingface_parts import ROPE_KEYS, ConversionError, Family, Rule, dropout

# ------------------------------------------------------------------------------------------- what a file means

# Keys that change nothing of what a model computes in evaluation: names, tokens, generation, the start of training.
_INERT_KEYS = """
    architectures auto_map model_type transformers_version torch_dtype dtype initializer_range use_cache pretraining_tp
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix task_specific_params
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn
    n_ctx hidden_act cache_implementation return_dict output_hidden_states output_attentions output_scores
    return_dict_in_generate id2label label2id num_labels problem_type finetuning_task torchscript use_bfloat16
    tf_legacy_loss tie_encoder_decoder is_decoder is_encoder_decoder cross_attention_hidden_size chunk_size_feed_forward
    bad_words_ids begin_suppress_tokens suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values
    repetition_penalty temperature top_k top_p typical_p embd_pdrop init_std unsloth_version unsloth_fixed rope_interleaved
"""
_INERT = frozenset(_INERT_KEYS.split())
# Keys that the code of every family heeds, whether its class names them or not → what they must be.
_NEUTRAL = {
    "is_causal": True,
    "use_bidirectional_attention": False,
    "pruned_heads": {},
    "add_cross_attention": False,
    "per_layer_config": None,
    "transformers_weights": None,
}


def meaning(hf: dict[str, Any]) -> dict[str, Any]:
    """A config.json's content → the value of every key that decides the model, those that it leaves out included.

    Raises ConversionError for another model_type, quantised weights, a file that the class itself refuses, and a key that
    says what kitbash has no part for.
    """
    family = FAMILIES.get(str(hf.get("model_type")))
    if family is None:
        raise ConversionError(
            f"model_type={hf.get('model_type')!r} is not one of the families that can be read: {', '.join(FAMILIES)}."
        )
    for key in ("quantization_config", "compression_config"):
        if hf.get(key):
            method = hf[key].get("quant_method") if isinstance(hf[key], dict) else None
            raise ConversionError(
                f"The weights are quantised (config.json's {key}, quant_method={method!r}), which cannot be read here; use the "
                "model as it was before quantisation, or dequantise it with transformers and save that."
            )
    asked = _ask_class(family, hf)
    if asked is not None:
        values, special = asked
    else:
        values = {**family.defaults, **hf}
        special = hf.keys() - family.defaults.keys() - _INERT - family.dropouts.keys() - _NEUTRAL.keys() - ROPE_KEYS
        special = {key: hf[key] for key in sorted(special) if not key.startswith("_")}
        if special:
            raise ConversionError(
                f"What {', '.join(special)} in this config.json means is known to the class in transformers, which is not "
                "installed: pip install transformers."
            )
    special |= {key: values[key] for key, neutral in _NEUTRAL.items() if values.get(key) not in (None, neutral)}
    if special:
        raise ConversionError(
            f"{', '.join(f'{key}={value!r}' for key, value in special.items())} in this config.json has no counterpart here."
        )
    return values


def _ask_class(family: Family, hf: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The values of the class's own config object, and those among them that are not known here and not the default.

    None where there is no such class. Raises ConversionError with the class's reason if it refuses the file.
    """
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        kind = CONFIG_MAPPING[family.model_type]
    except (ImportError, KeyError):  # not installed, or from before the family
        return None
    with quiet_transformers():
        try:
            config = kind.from_dict({key: value for key, value in copy.deepcopy(hf).items() if value != {}})
            if hasattr(config, "standardize_rope_params"):
                config.standardize_rope_params()  # as building the model does, with the attributes set by now
        except Exception as error:  # each version and each key has errors of its own kind
            reason = " ".join(str(error).split()).rstrip(".")
            raise ConversionError(f"transformers' {kind.__name__} does not accept this config.json: {reason}.") from error
        values, own = config.to_dict(), _own_defaults(kind)
    known = family.defaults.keys() | _INERT | family.dropouts.keys() | _NEUTRAL.keys() | ROPE_KEYS
    return values, {
        key: values.get(key)
        for key, default in own.items()
        if key not in known and values.get(key) != default and (values.get(key) or default)
    }


@lru_cache
def _own_defaults(kind: type) -> dict[str, Any]:
    """The defaults of the keys that a config class has beyond those of its base class."""
    from transformers import PretrainedConfig

    common = PretrainedConfig().to_dict()
    return {key: value for key, value in kind().to_dict().items() if key not in common}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings about keys, which are told here as errors where they matter."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


# ------------------------------------------------------------------------------------------- both ways


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """A config.json's content → ModelConfig. Raises ConversionError for a family or part that is not here."""
    values = meaning(hf)
    family = FAMILIES[hf["model_type"]]
    try:
        keys = {
            "pad_vocab_multiple": 1,
            "vocab_size": values["vocab_size"],
            "weight_tying": bool(values["tie_word_embeddings"]),
            "dropout": dropout(family, values),
            **family.parts,
            **family.read(values),
        }
        return resolve("custom", **keys)
    except KeyError as error:
        raise ConversionError(f"This config.json of model_type {family.model_type!r} has no {error}.") from error
    except (TypeError, ZeroDivisionError) as error:
        raise ConversionError(f"This config.json cannot be built here: a size in it is no positive number ({error}).") from error
    except ValueError as error:
        raise ConversionError(f"This config.json cannot be built here: {error}") from error


def _differences(config: ModelConfig, hf: dict[str, Any]) -> list[str] | None:
    """What a config.json says otherwise than the model, as key=value of the model; None if it cannot be read.

    How the weights started and which attention computes are no part of it; nor is dropout where the class lacks it.
    """
    try:
        again = config_from_hf(hf).to_dict()
    except ConversionError:
        return None
    ignored = {"zero_init"} | ({"dropout"} if not FAMILIES[hf["model_type"]].has_our_dropout else set())
    wanted = {**config.to_dict(), "pad_vocab_multiple": 1, "attention_backend": again["attention_backend"]}
    return [f"{key}={wanted[key]!r}" for key in wanted if key not in ignored and again[key] != wanted[key]]


def config_to_hf(config: ModelConfig, source: dict[str, Any] | None = None) -> dict[str, Any]:
    """ModelConfig → the content of a config.json that AutoModelForCausalLM builds.

    `source`: the config.json that the model came from. It is given back as it was if it still says what the model is; else
    its family is tried first, with what it says besides. A file fits when, read back, it is this model: what it cannot say
    it cannot hide. Raises ConversionError naming the parts without a counterpart.
    """
    nearest: tuple[list[str], Family] | None = None
    own = FAMILIES.get((source or {}).get("model_type", ""))
    for family, hf in _candidates(config, source, own):
        differs = _differences(config, hf)
        if differs == []:
            return hf
        if differs is not None and (nearest is None or len(differs) < len(nearest[0])):
            nearest = (differs, family)
    if nearest is None:
        raise ConversionError(f"No Hugging Face class builds {config.name}.")
    differs, family = nearest
    raise ConversionError(
        f"No Hugging Face class builds {config.name}: the nearest, {family.architecture}, has no {', '.join(differs)}."
    )


def _candidates(
    config: ModelConfig, source: dict[str, Any] | None, own: Family | None
) -> Iterator[tuple[Family, dict[str, Any]]]:
    """Files that may describe the model, the best first."""
    if own:
        yield own, dict(source)
        yield own, dict(source, tie_word_embeddings=config.weight_tying)
        replaced = ROPE_KEYS | {"layer_types", "hidden_act"}
        yield own, {**{key: value for key, value in source.items() if key not in replaced}, **_written(own, config)}
    for family in sorted(FAMILIES.values(), key=lambda family: family is not own):
        yield family, _written(family, config)


def _written(family: Family, config: ModelConfig) -> dict[str, Any]:
    return dict(
        architectures=[family.architecture],
        model_type=family.model_type,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.weight_tying,
        **family.write(config),
    )


def family_of(config: ModelConfig) -> Family:
    """The family whose class builds exactly this model. Raises ConversionError naming the parts without a counterpart."""
    return FAMILIES[config_to_hf(config)["model_type"]]


def tensor_rules(config: ModelConfig, model_type: str) -> list[Rule]:
    """How every tensor of the model is called in the Hugging Face family, and how it is laid out there."""
    return list(FAMILIES[model_type].rules(config))
