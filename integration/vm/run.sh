#!/bin/bash
# run.sh DIR PAYLOAD: boots the machine of DIR with the directory PAYLOAD unpacked at /run/payload, runs its run.sh,
# prints the console, and exits as run.sh did. VM_SYSTEMD=1 makes systemd its init;
# VM_APPEND is more for the kernel's command line. What the guest writes to its third
# disk is in the file VM_OUT.
set -euo pipefail
dir=${1:?usage: run.sh DIR PAYLOAD} payload=${2:?usage: run.sh DIR PAYLOAD}
archive=$(mktemp) log=$(mktemp)
trap 'rm -f "$archive" "$log"' EXIT
tar -C "$payload" -cf "$archive" .
truncate -s %512 "$archive"
timeout "${VM_TIMEOUT:-900}" qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max -m 3072 -smp "${VM_CPUS:-2}" -nographic -no-reboot \
  -snapshot -kernel "$dir/vmlinuz" -initrd "$dir/initrd.gz" \
  -drive "file=$dir/root.img,if=virtio,format=raw,cache=unsafe" -drive "file=$archive,if=virtio,format=raw" \
  ${VM_OUT:+-drive "file=$VM_OUT,if=virtio,format=raw,snapshot=off"} \
  -append "console=ttyS0 quiet panic=-1${VM_SYSTEMD:+ stasis.systemd}${VM_APPEND:+ $VM_APPEND}" </dev/null | tee "$log"
code=$(tr -d '\r' <"$log" | sed -nE 's/^vm-exit-code: ([0-9]+).*/\1/p' | tail -n 1)
exit "${code:-70}"
