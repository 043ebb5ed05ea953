#!/bin/sh
# Runs a test of the kernels on instruction sets that this machine lacks, emulated.
#
#     tools/emulate_cpu.sh MODEL TEST [FILTER]
#     tools/emulate_cpu.sh sapphire_rapids oracle_recur equal_keys
#     tools/emulate_cpu.sh aarch64 oracle_attend
#
# MODEL is aarch64 (NEON; qemu-user and a cross compiler with the target's std), or a processor that Bochs
# knows: tigerlake (AVX-512), sapphire_rapids (AMX too), arrow_lake (AVX-VNNI). A Bochs machine is booted with
# the test in its memory; it runs some 25 million instructions a second, so that a test of a second takes
# minutes. It has one processor, on which a pool's second thread would only spin: the test is built from a
# copy whose pools have one thread. Bochs 3.0 multiplies the bytes of AMX tiles as unsigned numbers in all four
# instructions: attention and matrix products on AMX fail there, where nothing but its BF16 tiles is right.
#
#     KERNEL   a Linux image to boot: 6.12 for the others, one that knows setcpuid= (6.15) for sapphire_rapids
#     BOCHS    default bochs-bin, version 3.0 or later
#     WORK     folder for the copy and the image, default target/emulated
#
# Debian's packages: bochs, busybox-static, grub-pc-bin, grub-common, xorriso, mtools, cpio; qemu-user,
# gcc-aarch64-linux-gnu, g++-aarch64-linux-gnu.
set -eu
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
model=$1 test=$2 filter=${3:-}
cd "$(dirname "$0")/.."

if [ "$model" = aarch64 ]; then
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu"
    exec cargo test --release -p mneme-kernels --target aarch64-unknown-linux-gnu --test "$test" -- --test-threads=1 $filter
fi
append=
case $model in
    tigerlake | arrow_lake) ;;
    # Bochs has AMX without XFD (10*32 + 4), which Linux asks for before it allows tiles. Said to be there, it
    # does nothing: tiles are always allowed, but do not survive a change of threads.
    sapphire_rapids) append="setcpuid=324 no5lvl" ;;
    *) usage ;;
esac
: "${KERNEL:?names no Linux image}"
work=${WORK:-$PWD/target/emulated}
source=$work/source root=$work/$model.$test/root boot=$work/$model.$test/iso/boot
rm -rf "$source" "$work/$model.$test"
mkdir -p "$source" "$root/bin" "$root/proc" "$root/sys" "$root/dev" "$root/tmp" "$boot/grub"

git ls-files -z | xargs -0 cp --parents -t "$source"
sed -i -E 's/Pool::new\([0-9a-z_]+\)/Pool::new(1)/g' "$source"/kernels/tests/*.rs "$source"/kernels/tests/*/*.rs
binary=$(cd "$source" && CARGO_TARGET_DIR=$work/target cargo test --release -p mneme-kernels --test "$test" --no-run 2>&1 |
    sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
[ -n "$binary" ] || { echo "no test $test, or it does not compile" >&2; exit 1; }

strip -o "$root/bin/test" "$binary"
ldd "$binary" | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "$root$(dirname "$library")"
    cp -L "$library" "$root$library"
done
cp "$(command -v busybox)" "$root/bin/busybox"
cat > "$root/init" <<INIT
#!/bin/busybox sh
busybox mount -t proc p /proc; busybox mount -t devtmpfs d /dev; busybox mount -t tmpfs t /tmp
/bin/test --test-threads=1 $filter > /dev/ttyS0 2>&1 < /dev/null
busybox sleep 1
busybox poweroff -f
INIT
chmod +x "$root/init"
(cd "$root" && find . | cpio -o -H newc 2> /dev/null | gzip -1 > "$boot/initrd.gz")
cp "$KERNEL" "$boot/vmlinuz"
cat > "$boot/grub/grub.cfg" <<GRUB
set timeout=0
menuentry test {
    linux /boot/vmlinuz console=ttyS0 loglevel=4 mitigations=off nokaslr tsc=reliable lpj=1000000 no_timer_check $append
    initrd /boot/initrd.gz
}
GRUB
grub-mkrescue -o "$work/$model.$test.iso" "$work/$model.$test/iso" > /dev/null 2>&1
cat > "$work/$model.$test.rc" <<RC
plugin_ctrl: unmapped=1, biosdev=1, speaker=0, parallel=0
cpu: model=$model, count=1, ips=100000000, reset_on_triple_fault=0
memory: guest=2048, host=2048
romimage: file=\$BXSHARE/BIOS-bochs-latest
vgaromimage: file=\$BXSHARE/VGABIOS-lgpl-latest
display_library: rfb, options="timeout=0"
boot: cdrom
ata0-master: type=cdrom, path=$work/$model.$test.iso, status=inserted
com1: enabled=1, mode=file, dev=$work/$model.$test.out
log: $work/$model.$test.log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
clock: sync=none
RC
rm -f "$work/$model.$test.out"
# It ends with a panic about power that is gone.
BXSHARE=${BXSHARE:-/usr/share/bochs} "${BOCHS:-bochs-bin}" -q -f "$work/$model.$test.rc" < /dev/null > "$work/$model.$test.console" 2>&1 || true
cat "$work/$model.$test.out"
grep -q '^test result: ok' "$work/$model.$test.out"
