#!/usr/bin/env bash
# A SLURM cluster of several nodes on one machine, for tests and for learning: loopback only, up in seconds.
#   slurm/local_cluster.sh start [DIR] [--nodes N] [--cpus C]     prints the line that points SLURM's commands at it
#   slurm/local_cluster.sh stop [DIR]
#   slurm/local_cluster.sh install                slurm-wlm and munge, as `start` does where they are missing
#   slurm/local_cluster.sh crash NODE [DIR]       the node dies as in a power cut: everything on it ends at once
#   slurm/local_cluster.sh boot NODE [DIR]        and comes back
# Debian's slurm-wlm and munge, installed by apt-get where it may (root, or sudo without a password). The cluster itself
# needs no root, no systemd and no cgroups. DIR (build/slurm) holds all it writes; stop ends the processes whose pid
# files lie there, and no others.
set -euo pipefail
shopt -s nullglob

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() { sed -n '2,7p' "${BASH_SOURCE[0]}" | cut -c3- >&2; exit 2; }
say() { echo "local_cluster: $*" >&2; }

command=${1:-} node= dir= nodes=2 cpus=8
shift || usage
if [ "$command" = crash ] || [ "$command" = boot ]; then node=${1:-}; [ -n "$node" ] || usage; shift; fi
while [ $# -gt 0 ]; do
  case $1 in
    --nodes) nodes=${2:?}; shift 2 ;;
    --cpus) cpus=${2:?}; shift 2 ;;
    -*) usage ;;
    *) [ -z "$dir" ] || usage; dir=$1; shift ;;
  esac
done
dir=${dir:-$here/build/slurm}
case $dir in /*) ;; *) dir=$PWD/$dir ;; esac
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$dir/slurm.conf

install_packages() {
  type slurmctld slurmd srun munged >/dev/null 2>&1 && return
  type apt-get >/dev/null 2>&1 || { say "no SLURM here, and no apt-get to install it: see slurm/README.md"; exit 3; }
  say "installing slurm-wlm and munge"
  local as=() log
  [ "$(id -u)" = 0 ] || as=(sudo -n)
  log=$(mktemp)
  # no daemon of the distribution's own is started: policy-rc.d is asked by Debian's maintainer scripts
  { "${as[@]}" timeout 120 apt-get update -qq &&
    "${as[@]}" timeout 300 env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
      apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >"$log" 2>&1 || true
  type slurmctld slurmd srun munged >/dev/null 2>&1 && return
  tail -n 5 "$log" >&2
  say "slurm-wlm and munge cannot be installed here. As root: apt-get install slurm-wlm munge"
  exit 3
}

alive() { # PIDFILE NAME: whether the process of that file runs, and is what the file says (a zombie has no command line)
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] && [ -n "$(tr '\0' ' ' <"/proc/$pid/cmdline")" ]
}

free_ports() { # COUNT: the first of so many ports in a row that nobody listens on
  local base port busy
  for _ in $(seq 50); do
    base=$((20000 + RANDOM % 12000)) busy=
    for port in $(seq "$base" $((base + $1 - 1))); do
      if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then busy=1; break; fi
    done
    [ -n "$busy" ] || { echo "$base"; return; }
  done
  say "found no $1 free ports in a row"
  exit 1
}

write_conf() {
  local base host plugins
  base=$(free_ports $((nodes + 1))) host=$(hostname -s)
  # find fails over folders it may not read
  plugins=$(find /usr/lib /usr/lib64 /usr/local/lib -name auth_munge.so 2>/dev/null | head -n 1 || true)
  # cred_expire: a requeued job waits until its old credential has expired, two minutes by default.
  # FirstJobId: ports of jobs follow from their ids, and two clusters of one machine must not meet there.
  cat >"$SLURM_CONF" <<CONF
ClusterName=vtok
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.log
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=600
FirstJobId=$((1000 + RANDOM))
SlurmctldTimeout=30
SlurmdTimeout=${VTOK_SLURM_NODE_TIMEOUT:-20}
MailProg=/bin/true
PluginDir=${plugins%/*}
PlugStackConfig=/dev/null
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/log/slurmd-%n.log
SlurmdSpoolDir=$dir/spool-%n
$(for i in $(seq "$nodes"); do
  echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + i)) CPUs=$cpus RealMemory=4000 State=UNKNOWN"
done)
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=spare Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
CONF
}

start() {
  install_packages
  # its sockets lie in DIR, and the kernel holds their paths to 108 bytes
  [ ${#dir} -le 80 ] || { say "DIR=$dir is longer than 80 characters: choose a shorter one"; exit 2; }
  if alive "$dir/slurmctld.pid" slurmctld; then
    say "already running in $dir"
    echo "export SLURM_CONF=$SLURM_CONF"
    return
  fi
  rm -rf "$dir"/state "$dir"/spool-* "$dir"/log "$dir"/munge
  mkdir -p "$dir"/state "$dir"/log "$dir"/munge
  # a munge of its own, with its own key and socket: the distribution's needs systemd
  (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
  chmod 711 "$dir/munge"
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" --num-threads=2 2>>"$dir/log/munged.err"
  write_conf
  slurmctld -c -f "$SLURM_CONF"
  for i in $(seq "$nodes"); do slurmd -N "node$i" -f "$SLURM_CONF"; done
  for _ in $(seq 150); do
    if [ "$(sinfo -h -o '%t %D' 2>/dev/null)" = "idle $nodes" ]; then
      say "$nodes nodes; partitions main, and spare, whose jobs give way to main's. End: slurm/local_cluster.sh stop $dir"
      echo "export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.2
  done
  say "the cluster did not come up in 30 s"
  sinfo -N -l >&2 || true
  tail -n 20 "$dir"/log/*.log >&2
  stop
  exit 1
}

end() { # SIGNAL PIDFILE NAME
  if alive "$2" "$3"; then kill "-$1" "$(cat "$2")" 2>/dev/null || true; fi
}

each_daemon() { # COMMAND ...: called with each pid file and its process's name
  local file
  for file in "$dir"/slurmd-*.pid; do "$@" "$file" slurmd; done
  "$@" "$dir/slurmctld.pid" slurmctld
  "$@" "$dir/munge/pid" munged
}

stop() {
  if alive "$dir/slurmctld.pid" slurmctld; then
    timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 50); do [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break; sleep 0.2; done
    timeout 10 scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
  fi
  local i found
  for i in $(seq 100); do
    found=$(each_daemon alive_one)
    [ -n "$found" ] || { say "stopped"; return; }
    if [ "$i" = 1 ]; then each_daemon end TERM; elif [ "$i" = 80 ]; then each_daemon end KILL; fi
    sleep 0.1
  done
  say "still running: $found"
  exit 1
}
alive_one() { if alive "$1" "$2"; then echo "$2"; fi; }

processes_of() { # NODE: what SLURM started there (by the environment of its jobs), and who looks after that
  local file pid
  for file in /proc/[0-9]*/environ; do
    pid=${file#/proc/} pid=${pid%/environ}
    if grep -qzxF "SLURMD_NODENAME=$1" "$file" 2>/dev/null && grep -qzxF "SLURM_CONF=$SLURM_CONF" "$file" 2>/dev/null; then
      echo "$pid"
      pid=$(awk '/^PPid/ { print $2 }' "/proc/$pid/status" 2>/dev/null || true)
      case $(cat "/proc/$pid/comm" 2>/dev/null) in slurmstepd*) echo "$pid" ;; esac
    fi
  done | sort -u
}

crash() {
  end KILL "$dir/slurmd-$node.pid" slurmd
  local pids
  pids=$(processes_of "$node")
  # shellcheck disable=SC2086
  [ -z "$pids" ] || kill -KILL $pids 2>/dev/null || true
  rm -rf "$dir/spool-$node"
  say "$node is gone, with $(wc -w <<<"$pids") processes; SLURM notices within $(sed -n 's/^SlurmdTimeout=//p' "$SLURM_CONF") s"
}

boot() { slurmd -N "$node" -f "$SLURM_CONF"; say "$node is back"; }

case $command in
  start | stop) "$command" ;;
  install) install_packages ;;
  crash | boot)
    grep -q "^NodeName=$node " "$SLURM_CONF" 2>/dev/null || { say "no node $node in $SLURM_CONF"; exit 2; }
    "$command"
    ;;
  *) usage ;;
esac
