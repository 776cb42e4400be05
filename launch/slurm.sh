#!/bin/bash
# Train on two hosts under Slurm: sbatch launch/slurm.sh model.path=MODEL data=chat data.path=CHATS run_dir=SHARED/run
#
# Arguments are those of launch/train.py; run_dir must be a folder that all hosts see. Ahead of its end, or when it is
# preempted, Slurm sends SIGTERM: the ranks finish their step, save, and end with 75, and the job is queued again. The
# same command then goes on from the checkpoint, with the same losses.
#SBATCH --job-name=ringflash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -u

cd "${SLURM_SUBMIT_DIR:?start this by sbatch}"
case " $*" in
*" run_dir="*) ;;
*)
    echo "give run_dir=FOLDER, of a folder that all hosts see: without it a job that is queued again starts anew" >&2
    exit 1
    ;;
esac
seconds_to_save=240
processes_per_host=${PROCESSES_PER_HOST:-${SLURM_GPUS_ON_NODE:-8}}
first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
stopped=no

srun --kill-on-bad-exit=0 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$processes_per_host" \
    --rdzv-backend c10d --rdzv-endpoint "$first_host:$port" --rdzv-id "$SLURM_JOB_ID" \
    --shutdown-timeout "$seconds_to_save" \
    launch/train.py "$@" &
step=$!

# Slurm signals this shell alone (B:); srun hands the signal on to torchrun on each host, and that to its ranks.
trap 'stopped=yes; kill -TERM "$step"' TERM
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do # the signal ended the wait, not the step
    wait "$step"
    status=$?
done

if [ "$stopped" = yes ] && [ "$status" != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 75
fi
exit "$status"
