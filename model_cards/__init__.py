"""Templates of the model cards, installed as `diffusers_ctx.model_cards`."""
