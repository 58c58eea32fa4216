#!/bin/bash
# Whether this node can train: prints "NODE: what is wrong", a line each, and exits with 1 if there is any.
#
#   srun --ntasks-per-node 1 bash examples/slurm/check_node.sh NUM_GPUS
#
# IB_PORTS=4 asks for as many active InfiniBand ports; IB_CLASS says where the kernel lists them.
set -uo pipefail
trap '' USR1 # of a time limit that is near: for the ranks
num_gpus=$1 node=${SLURMD_NODENAME:-$(hostname -s)} num_faults=0
none='^(0|No|\[?N/A\]?)$'

fault() {
  echo "$node: $1"
  num_faults=$((num_faults + 1))
}

ask() {
  timeout 60 nvidia-smi "$@" --format=csv,noheader,nounits 2>&1
}

if gpus=$(ask --query-gpu=index,memory.used,ecc.errors.uncorrected.volatile.total); then
  found=$(wc -l <<<"$gpus")
  [ "$found" -eq "$num_gpus" ] || fault "$found GPUs, $num_gpus are asked for"
  while IFS=', ' read -r index used errors; do
    [ "$used" -lt 2000 ] || fault "GPU $index: $used MiB are in use by somebody else"
    [[ $errors =~ $none ]] || fault "GPU $index: $errors uncorrected memory errors since it was started"
  done <<<"$gpus"
  if rows=$(ask --query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure); then
    while IFS=', ' read -r bus pending failure; do
      [[ $pending =~ $none ]] || fault "GPU $bus: memory rows wait to be remapped; it needs a reset"
      [[ $failure =~ $none ]] || fault "GPU $bus: memory rows could not be remapped; it needs an exchange"
    done <<<"$rows"
  fi
  links=$(timeout 60 nvidia-smi nvlink --status | grep -ci inactive)
  [ "$links" -eq 0 ] || fault "$links NVLinks are inactive"
else
  fault "nvidia-smi fails, or takes more than a minute: ${gpus%%$'\n'*}"
fi

ports=$(cat "${IB_CLASS:-/sys/class/infiniband}"/*/ports/*/state 2>/dev/null | grep -c ACTIVE)
[ "$ports" -ge "${IB_PORTS:-0}" ] || fault "$ports active InfiniBand ports, IB_PORTS asks for $IB_PORTS"

for folder in /dev/shm /tmp; do
  free=$(df --output=avail -k "$folder" | tail -n 1)
  [ "$free" -ge 1000000 ] || fault "$folder has $free KB free; NCCL and data workers need a million"
done

exit $((num_faults > 0))
