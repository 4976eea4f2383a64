"""Measures a context adapter on held-out images: its contexts, compositions and counterfactuals.

    accelerate launch train_scripts/evaluate_context_adapter.py weather-context held-out --output_dir results

`held-out` has a sub-folder of images per context as in training, and may have compositions, such as `night+snow`.
Half of each context's images are compared with as many samples; the other half gives the real-vs-real baseline.
Images are written as they are made: the same command, given again, continues where it stopped.
"""

from diffusers_ctx.evaluation.__main__ import main


if __name__ == "__main__":
    main()
