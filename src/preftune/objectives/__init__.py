"""Pure losses: tensors in, (loss, metrics) out. Nothing here knows a model, a tokenizer, a config or a device."""
