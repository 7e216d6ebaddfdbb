#!/usr/bin/env bash
# Tries the Debian package in a virtual machine: installation, the service with its rights, a credential, reload, restarts and an
# upgrade by the socket, crashes, wrong settings, the watchdog, removal. Not a part of CI: a minute with KVM, ten without.
#
#   cargo deb --profile dist
#   apt-get install debootstrap qemu-system-x86 e2fsprogs
#   tests/ops/vm.sh target/debian/afterimage_*.deb        as root
#
# The machine's files are kept in target/vm. AFTERIMAGE_TEST_ACCELERATOR=tcg is for where /dev/kvm doesn't work.
set -euo pipefail
package=$(realpath "$1")
cd "$(dirname "$0")/../.."
mkdir -p target/vm
cd target/vm

if ! [ -e root/vmlinuz ]; then
  rm -rf root
  debootstrap --variant=minbase \
    --include=systemd,systemd-sysv,dbus,adduser,redis-server,curl,linux-image-cloud-amd64,initramfs-tools,iproute2,procps,man-db \
    bookworm root
fi
cp "$package" root/root/afterimage.deb

cat > root/root/trial.sh <<'GUEST'
#!/bin/bash
exec > /dev/ttyS0 2>&1
trap 'systemctl poweroff --force' EXIT
set -e
fail() { echo "FAILED: $*"; systemctl status --no-pager afterimage || true; journalctl --no-pager -n 30 -u afterimage; exit 1; }
step() { echo "trial: $*"; }
prop() { systemctl show -p "$1" --value afterimage; }
until_true() {
  local end=$((SECONDS + 120))
  until "$@" > /dev/null 2>&1; do [ $SECONDS -lt $end ] || fail "never: $*"; sleep 0.2; done
}
ready() { curl -sf http://127.0.0.1:8001/readyz; }
is() { [ "$(prop "$1")" = "$2" ]; }

step installation
dpkg -i /root/afterimage.deb
systemctl is-enabled afterimage || fail "the service isn't enabled"
until_true ready
[ "$(stat -c %U:%a /var/lib/afterimage)" = afterimage:700 ] || fail "rights of the state folder"
[ "$(stat -c %G:%a /etc/afterimage/afterimage.toml)" = afterimage:640 ] || fail "rights of the settings"
systemd-analyze security --no-pager afterimage | tail -1

step "a write with the token, and one by the program"
echo R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs= | base64 -d > /tmp/dot.gif
token=$(cat /var/lib/afterimage/write-token-8000)
curl -sf -o /dev/null -T /tmp/dot.gif -H "Authorization: Bearer $token" http://127.0.0.1:8000/images/dot
runuser -u afterimage -- afterimage put --config /etc/afterimage/afterimage.toml dot2 /tmp/dot.gif
curl -sf -o /dev/null http://127.0.0.1:8000/images/dot2

step reload
before=$(prop MainPID)
systemctl reload afterimage
until_true ready
is MainPID "$before" || fail "a reload ended the process"
is ActiveState active || fail "state $(prop ActiveState)"
prop StatusText

step "Redis, by a credential"
systemctl start redis-server
echo redis://127.0.0.1:6379 | install -m 600 /dev/stdin /etc/afterimage/redis-url
mkdir -p /etc/systemd/system/afterimage.service.d
printf '%s\n' '[Service]' LoadCredential=redis-url:/etc/afterimage/redis-url Environment=REDIS_URL_FILE=%d/redis-url \
  > /etc/systemd/system/afterimage.service.d/redis.conf
systemctl daemon-reload
systemctl restart afterimage
redis-cli SET image:redis '{"base64_data":"R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="}'
until_true curl -sf http://127.0.0.1:8000/images/redis
[ "$(cat /var/lib/afterimage/write-token-8000)" = "$token" ] || fail "another token"

step "a backup, to the embedded store"
afterimage export --redis redis://127.0.0.1:6379 /tmp/images.backup
afterimage import --embedded-dir /tmp/store /tmp/images.backup
afterimage list --embedded-dir /tmp/store | grep redis

ask() { while [ ! -e /tmp/stop ]; do curl -s -o /dev/null -w '%{http_code}\n' --max-time 60 http://127.0.0.1:8000/images/redis || true; done > "/tmp/answers.$1"; }
step "restarts and an upgrade by the socket"
systemctl stop afterimage
systemctl enable --now afterimage.socket
systemctl start afterimage
ask 1 & ask 2 &
until_true test -s /tmp/answers.1
for _ in 1 2 3; do systemctl restart afterimage; done
dpkg -i /root/afterimage.deb
until_true ready
touch /tmp/stop; wait
sort /tmp/answers.* | uniq -c
! grep -qv 200 /tmp/answers.* || fail "a request was refused"
systemctl stop afterimage.socket afterimage
systemctl disable afterimage.socket
systemctl start afterimage
until_true ready

step "a crash"
kill -KILL "$(prop MainPID)"
until_true is NRestarts 1
until_true ready
step "wrong settings"
sed -i 's/^demo/demon/' /etc/afterimage/afterimage.toml
systemctl restart afterimage || true
until_true is ActiveState failed
is ExecMainStatus 2 || fail "exit code $(prop ExecMainStatus)"
sed -i 's/^demon/demo/' /etc/afterimage/afterimage.toml
systemctl restart afterimage
until_true ready
step "the watchdog"
restarts=$(prop NRestarts)
kill -STOP "$(prop MainPID)"
until_true is NRestarts $((restarts + 1))
until_true ready
! journalctl --no-pager | grep -i 'SIGSYS\|status=31/SYS' || fail "a system call was refused"

step removal
dpkg -r afterimage
[ -e /var/lib/afterimage/write-token-8000 ] && [ -e /etc/afterimage/afterimage.toml ] || fail "a removal took data"
dpkg -P afterimage
[ ! -e /var/lib/afterimage ] && [ ! -e /etc/afterimage/afterimage.toml ] || fail "a purge left data"
! getent passwd afterimage || fail "a purge left the user"
[ -e /etc/afterimage/redis-url ] || fail "a purge took a file of the administrator's"
echo PASSED
GUEST
chmod +x root/root/trial.sh

mkdir -p root/etc/systemd/system
printf '%s\n' '[Unit]' After=multi-user.target '[Service]' Type=oneshot TimeoutStartSec=infinity ExecStart=/root/trial.sh \
  > root/etc/systemd/system/trial.service
printf '%s\n' '[Unit]' Requires=multi-user.target After=multi-user.target Wants=trial.service \
  > root/etc/systemd/system/trial.target
ln -sf trial.target root/etc/systemd/system/default.target
rm -f root/var/cache/apt/archives/*.deb disk.img console.log
truncate -s 2500M disk.img
mkfs.ext4 -q -d root disk.img

accelerator=${AFTERIMAGE_TEST_ACCELERATOR-kvm}
[ -w /dev/kvm ] || accelerator=tcg
timeout 1800 qemu-system-x86_64 -accel "$accelerator" -cpu max -m 1024 -smp 2 -no-reboot -display none -monitor none -net none \
  -kernel root/vmlinuz -initrd root/initrd.img -append "root=/dev/vda rw console=ttyS0 quiet panic=-1" \
  -drive file=disk.img,if=virtio,format=raw -serial file:console.log
sed -n 's/\r$//; /trial: /,$p' console.log
grep -q PASSED console.log
