#!/bin/bash
# build.sh DIR: makes the test machine in DIR: kernel, initrd, root.img. Debian packages only; nothing is mounted.
#
# The guest has what a development machine often lacks: pure cgroup v2 with every controller, all capabilities,
# soft-dirty tracking, and Debian's own kernel: that of this release, or of VM_SUITE: trixie (Linux 6.12), or, from
# Ubuntu, jammy (5.15) and noble (6.8). It boots without KVM in a few seconds.
set -euo pipefail
dir=$(mkdir -p "${1:?usage: build.sh DIR}" && cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
suite=${VM_SUITE:-}
stamp=$({ cat "$here"/build.sh "$here"/init; echo "$suite"; } | sha256sum | cut -d' ' -f1)
[ "$(cat "$dir/stamp" 2>/dev/null)" = "$stamp" ] && exit 0

need=()
command -v qemu-system-x86_64 >/dev/null || need+=(qemu-system-x86)
command -v debootstrap >/dev/null || need+=(debootstrap)
command -v mke2fs >/dev/null || need+=(e2fsprogs)
command -v cpio >/dev/null || need+=(cpio)
[ -e /bin/busybox ] || need+=(busybox-static)
[ ${#need[@]} -eq 0 ] || DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null

root=$dir/root
rm -rf "$root" "$dir/kernel" && mkdir -p "$dir/kernel"
debootstrap --variant=minbase --include=criu,iptables,runc,crun,jq,procps,iproute2,busybox-static,libseccomp2,kmod,systemd,dbus,dbus-user-session,libpam-systemd,uidmap,apparmor \
  bookworm "$root" "$mirror" >"$dir/debootstrap.log"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/usr/share/{doc,man,locale}

meta=linux-image-cloud-amd64
if [ -z "$suite" ]; then
  package=$(apt-cache depends "$meta" | awk '/Depends: linux-image/ {print $2; exit}')
  (cd "$dir/kernel" && apt-get download -qq "$package" && dpkg-deb -x "$package"_*.deb .)
else
  archive=$mirror
  case $suite in jammy | noble) archive=${UBUNTU_MIRROR:-http://archive.ubuntu.com/ubuntu} meta=linux-image-virtual ;; esac
  index=$dir/kernel/Packages
  curl -fsSL "$archive/dists/$suite/main/binary-amd64/Packages.xz" | xz -d >"$index"
  # field PACKAGE FIELD: its first word
  field() { awk -v p="$1" -v f="$2:" '$1 == "Package:" {it = $2 == p} it && $1 == f {sub(/,$/, "", $2); print $2; exit}' "$index"; }
  image=$(field "$meta" Depends)
  # Ubuntu's modules are in a package of their own.
  for package in "$image" "${image/image/modules}"; do
    name=$(field "$package" Filename)
    [ -n "$name" ] || continue
    curl -fsSL "$archive/$name" -o "$dir/kernel/kernel.deb"
    echo "$(field "$package" SHA256)  $dir/kernel/kernel.deb" | sha256sum -c --quiet
    dpkg-deb -x "$dir/kernel/kernel.deb" "$dir/kernel"
  done
  [ -d "$dir/kernel/lib" ] || ln -s usr/lib "$dir/kernel/lib"
fi
cp "$dir"/kernel/boot/vmlinuz-* "$dir/vmlinuz"
version=$(basename "$dir"/kernel/boot/vmlinuz-*) && version=${version#vmlinuz-}
cp -a "$dir/kernel/lib/modules" "$root/lib/"
chroot "$root" depmod "$version"
install -m 755 "$here/init" "$root/sbin/stasis-vm-init"

# The initrd only loads the disk's modules and switches root.
ird=$dir/initrd && rm -rf "$ird" && mkdir -p "$ird"/{bin,mod,proc,sys,dev,new}
cp /bin/busybox "$ird/bin/"
mods=(virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk crc16 crc32c_generic libcrc32c mbcache jbd2 ext4)
for mod in "${mods[@]}"; do
  path=$(find "$dir/kernel/lib/modules/" -name "$mod.ko" -o -name "$mod.ko.xz" -o -name "$mod.ko.zst" | head -n 1)
  case $path in
  *.xz) xz -dc "$path" >"$ird/mod/$mod.ko" ;;
  *.zst) zstd -qdc "$path" >"$ird/mod/$mod.ko" ;;
  *.ko) cp "$path" "$ird/mod/" ;;
  esac
done
{
  echo '#!/bin/busybox sh'
  echo '/bin/busybox mount -t proc proc /proc; /bin/busybox mount -t sysfs sys /sys; /bin/busybox mount -t devtmpfs dev /dev'
  for mod in "${mods[@]}"; do [ -e "$ird/mod/$mod.ko" ] && echo "/bin/busybox insmod /mod/$mod.ko"; done
  echo 'n=0; until [ -b /dev/vda ] || [ $n = 100000 ]; do n=$((n+1)); done'
  echo '/bin/busybox mount -t ext4 /dev/vda /new && exec /bin/busybox switch_root /new /sbin/stasis-vm-init'
} >"$ird/init"
chmod +x "$ird/init"
(cd "$ird" && find . | cpio -o -H newc --quiet | gzip -1) >"$dir/initrd.gz"

rm -f "$dir/root.img"
mke2fs -q -t ext4 -d "$root" -L stasis "$dir/root.img" 3G
rm -rf "$root" "$ird" "$dir/kernel"
echo "$stamp" >"$dir/stamp"
