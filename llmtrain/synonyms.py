"""What other tools call the knobs: nanoGPT, litgpt, Lightning, Hugging Face's model configs and TrainingArguments."""

from __future__ import annotations

from collections.abc import Iterable

from llmtrain.knobs import nearest

ELSEWHERE = {
    "model.layers": "n_layer n_layers num_layers num_hidden_layers",
    "model.heads": "n_head n_heads num_heads num_attention_heads",
    "model.kv_heads": "n_kv_head n_kv_heads num_key_value_heads n_query_groups",
    "model.width": "n_embd d_model hidden_size embed_dim embedding_dim",
    "model.ffn_width": "n_inner d_ff intermediate_size ffn_dim",
    "model.context": "block_size seq_len seq_length sequence_length max_seq_len max_seq_length n_positions n_ctx "
    "max_position_embeddings context_length",
    "model.activation": "activation_function hidden_act",
    "model.norm_eps": "layer_norm_epsilon layer_norm_eps rms_norm_eps",
    "model.rope_base": "rope_theta",
    "model.tied_embeddings": "tied tie_embeddings tie_word_embeddings",
    "model.dropout": "resid_pdrop hidden_dropout_prob",
    "model.attention_dropout": "attn_pdrop attention_probs_dropout_prob",
    "tokenizer.vocab_size": "vocab_size n_vocab",
    "optim.lr": "learning_rate max_lr",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "epsilon adam_epsilon",
    "schedule": "lr_scheduler lr_scheduler_type decay_lr",
    "schedule.warmup": "warmup_iters warmup_ratio num_warmup_steps",
    "schedule.floor": "min_lr",
    "train.steps": "max_iters max_steps num_steps total_steps num_iterations",
    "train.epochs": "max_epochs num_epochs num_train_epochs",
    "train.tokens": "max_tokens",
    "train.batch_size": "per_device_train_batch_size train_batch_size micro_batch_size device_batch_size",
    "train.accumulate": "gradient_accumulation_steps grad_accum_steps accumulate_grad_batches",
    "train.grad_clip": "max_grad_norm max_norm_grad gradient_clip_val gradient_clipping",
    "train.compile": "torch_compile",
    "train.recompute": "gradient_checkpointing activation_checkpointing",
    "loss.label_smoothing": "label_smoothing_factor",
    "eval.every": "eval_interval eval_steps val_check_interval",
    "eval.batches": "eval_iters limit_val_batches",
    "eval.monitor": "metric_for_best_model",
    "eval.patience": "early_stopping_patience",
    "checkpoint.every": "save_every save_interval save_steps",
    "checkpoint.keep": "save_total_limit",
    "log.every": "log_interval logging_steps log_every log_every_n_steps",
    "run.dir": "out_dir output_dir",
    "run.name": "run_name exp_name wandb_run_name",
    "data": "dataset dataset_name",
    "resume": "init_from resume_from_checkpoint",
}
"""By knob or group, the words for it."""

_MEANT = {word: knob for knob, words in ELSEWHERE.items() for word in words.split()}


def meant(word: str, known: Iterable[str]) -> str | None:
    """The knob that is likely meant by a word that names none: another tool's word for it, or the nearest known."""
    return _MEANT.get(word.rsplit(".", 1)[-1].replace("-", "_").lower()) or nearest(word, known)
