"""The whole method on generated images: a picture of what the shipped adapter composes, then an adapter of your own.

    python train_scripts/demo_quad.py --output_dir runs/demo

Draws samples of the context adapter that comes with the library. Then writes quad images into one folder per context,
trains an adapter on the shipped Stable Diffusion with them, loads it as a user would, and compares its samples with
real images from held-out seeds, also under combinations of interventions that were never in the training data.

It is `diffusers-ctx demo`, for a checkout in which that is not installed.
"""

from diffusers_ctx.commands.demo import demo


if __name__ == "__main__":
    demo()
