#!/usr/bin/env bash
#
# install.sh - what the tests of tests/cluster need from Debian, or a line that says why it can't be had.
#
# Quick where all is there. Exit 0 in any case: the tests skip then, with their reason.

set -euo pipefail

cannot() {
    echo "tests/cluster/install.sh: the tests that need SLURM will skip: $*" >&2
    exit 0
}

declare -A PACKAGE_OF=([slurmctld]=slurmctld [slurmd]=slurmd [srun]=slurm-client [munged]=munge [pdsh]=pdsh
    [sshd]=openssh-server [ssh]=openssh-client [ip]=iproute2 [ps]=procps [shellcheck]=shellcheck)
PATH=$PATH:/usr/sbin:/sbin # where Debian has daemons

missing=()
for program in "${!PACKAGE_OF[@]}"; do
    command -v "$program" >/dev/null || missing+=("${PACKAGE_OF[$program]}")
done
((${#missing[@]})) || exit 0

command -v apt-get >/dev/null || cannot "${missing[*]} missing, and no apt-get here"
[[ $(id -u) == 0 ]] || cannot "${missing[*]} missing; as root: apt-get install ${missing[*]}"

echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{
    timeout 300 apt-get -q update && timeout 600 apt-get -q install -y --no-install-recommends "${missing[@]}"
} >"$log" 2>&1 || cannot "apt-get could not install ${missing[*]}: $(tail -n 1 "$log")"
