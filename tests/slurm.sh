#!/bin/sh
# A cluster of one node on this machine, to try hydra/launcher=submitit_slurm on. Debian or Ubuntu, as root:
#   tests/slurm.sh start    installs Slurm and munge where they are missing, and starts their daemons
#   tests/slurm.sh stop     stops them
# Configuration, state and logs lie in $SLURM_TRIAL (default /tmp/slurm-trial); nothing is started at boot. Jobs are
# cancelled and told of by squeue alone: sacct needs a database.
set -eu
place=${SLURM_TRIAL:-/tmp/slurm-trial}
conf=/etc/slurm/slurm.conf

stop() {
    for name in slurmd slurmctld munged; do
        [ -f "$place/$name.pid" ] && kill "$(cat "$place/$name.pid")" 2>/dev/null || true
        rm -f "$place/$name.pid"
    done
}

configure() {
    mkdir -p "$place/state" "$place/spool" /etc/slurm
    if [ -f "$conf" ] && ! grep -q '^ClusterName=trial$' "$conf"; then
        echo "$conf belongs to another cluster" >&2
        exit 1
    fi
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    cat > "$conf" <<END
ClusterName=trial
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$place/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=100000
ReturnToService=2
KillWait=10
SlurmctldPort=${SLURM_TRIAL_PORT:-16817}
SlurmdPort=$((${SLURM_TRIAL_PORT:-16817} + 1))
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=trial Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
}

start() {
    command -v slurmd >/dev/null && command -v munged >/dev/null ||
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge
    stop
    configure
    # munge signs what the daemons say to each other; it wants its files to be nobody else's
    (umask 077 && [ -f "$place/munge.key" ] || head -c 1024 /dev/urandom > "$place/munge.key")
    chmod 600 "$place/munge.key"
    chmod 755 "$place"
    munged --force --key-file="$place/munge.key" --socket="$place/munge.socket" --pid-file="$place/munged.pid" \
        --log-file="$place/munged.log" --seed-file="$place/munge.seed"
    slurmctld
    slurmd
    for _ in $(seq 30); do
        sinfo --noheader --states=idle 2>/dev/null | grep -q . && break
        sleep 1
    done
    sinfo
}

case "${1:-}" in
start) start ;;
stop) stop ;;
*) sed -n '2,6s/^# //p' "$0" && exit 2 ;;
esac
