"""What an option of the config cannot do without: data of its kind, a file, or a size that suits small texts."""

from __future__ import annotations

from pathlib import Path

_NEEDS = {
    "data=text": ["data.path={place}/text.txt"],
    "tokenizer=file": ["tokenizer.path={place}/tokenizer.json"],
    "tokenizer=bpe": ["tokenizer.vocab_size=300"],
    "tokenizer=wordpiece": ["tokenizer.vocab_size=300"],
    "tokenizer=unigram": ["tokenizer.vocab_size=400"],
    "data=mixture": ["data.sources={{{place}/texts.jsonl:1,{place}/text.txt:2}}"],
    "data=stdlib_modules": ["data.context=32"],
    "data=digits": ["model=mlp"],
    "data=diabetes": ["model=linear"],
    "data=mnist5k": ["model=mlp"],
    "data=breast_cancer": ["model=mlp"],
    "data=wine": ["model=mlp"],
    "data=iris": ["model=mlp"],
    "data=table": ["model=mlp", "data.path={place}/rows.csv", "data.label_column=y"],
    "data=npz": ["model=mlp", "data.path={place}/arrays.npz"],
    "data=labelled_text": ["model=textcnn", "data.path={place}/texts.jsonl"],
    "data=hf": ["data.path={place}/saved"],
    "data=tang": ["data.path={place}/poems"],
    "data=images": ["model=mlp", "data.path={place}/images", "data.size=8"],
    "task=masked_lm": ["model.causal=false"],
    **{
        f"augment={name}": ["model=mlp", "data=digits"]
        for name in ("image", "light", "heavy", "trivialaugment", "randaugment", "mixup", "cutmix")
    },
    "augment=table": ["model=linear", "data=diabetes"],
    "task=classification": ["model=mlp", "data=digits"],
    "task=regression": ["model=linear", "data=diabetes"],
    "task=probabilistic_regression": ["model=linear", "data=diabetes"],
    "task=counts": ["model=linear", "data=diabetes"],
    "task=multilabel": ["model=mlp", "data=digits"],
    **{
        f"loss={name}": ["model=linear", "data=diabetes"]
        for name in ("bce", "huber", "log_cosh", "mae", "mse", "quantile")
    },
    **{
        f"loss={name}": ["model=linear", "data=diabetes", "task=probabilistic_regression"]
        for name in ("gaussian_nll", "laplace_nll")
    },
    "loss=poisson_nll": ["model=linear", "data=diabetes", "task=counts"],
    "loss=sigmoid_focal": ["model=mlp", "data=digits", "task=multilabel"],
    "schedule=one_cycle": ["schedule.rise=2"],  # the last step after the peak hardly moves a weight
    "init=zeros": ["model=linear", "data=digits"],  # a single layer
    "init=mup": ["model.tied_embeddings=false"],
    "model=textcnn": ["data=stdlib_modules"],
    **{f"model={name}": ["data=digits"] for name in ("cnn", "cnn_cifar", "linear", "mlp")},
    "model=hf": ["model.path={place}/folder"],
    "tokenizer=model": ["model=hf", "model.path={place}/folder"],
}


def needs(option: str, place: Path | str) -> list[str]:
    """The words that go with an option such as `data=table`, files taken from a folder."""
    return [word.format(place=place) for word in _NEEDS.get(option, [])]
