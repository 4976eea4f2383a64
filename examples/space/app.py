"""The page of `diffusers-ctx ui`, as a Hugging Face Space."""

from diffusers_ctx.ui import build_page, launch


page = build_page("quad", hub_only=True)  # or an adapter of yours, such as "owner/name"

if __name__ == "__main__":
    launch(page)
