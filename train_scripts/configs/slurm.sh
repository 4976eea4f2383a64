#!/bin/bash
# One launcher per machine, which starts a process per GPU. Flags of the training script follow:
#   sbatch train_scripts/configs/slurm.sh --train_data_dir photos --output_dir weather-context ...
# Adapt the lines below, and activate your environment before `srun` if the job does not inherit it. Data, output and
# the caches must lie where all machines see them.
#SBATCH --job-name=context-adapter
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120  # time to save a checkpoint; go on with --resume_from_checkpoint latest

set -euo pipefail

export CONFIG=${CONFIG:-train_scripts/configs/ddp.yaml}
export SCRIPT=${SCRIPT:-train_scripts/train_context_text_to_image.py}
MAIN_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_HOST

# a machine that fails ends the others
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$CONFIG" \
        --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
        --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) \
        --main_process_ip "$MAIN_HOST" --main_process_port "${MAIN_PORT:-29500}" \
        "$SCRIPT" "$@"
' slurm.sh "$@"
