#!/bin/bash
# A real S3 server for the tests: Ceph's RGW with one monitor and one in-memory OSD, on loopback.
#
#   start_s3.sh start DIR   prints the endpoint once it answers; keys are testkey / testsecret
#   start_s3.sh stop DIR    ends the daemons that `start` left in DIR, by their pid files
#
# Every port is a free one and everything lies in DIR, so that several can run side by side.
set -euo pipefail
command=$1
mkdir -p "$2"
cd "$2"

stop() {
    local file
    for file in client.rgw.pid osd.0.pid mon.a.pid; do
        # Nothing in memory is worth a slow goodbye.
        [ ! -s $file ] || kill -KILL "$(cat $file)" 2>/dev/null || true
        rm -f $file
    done
}

free_ports() { # below the range from which the kernel takes ports for outgoing connections
    python3 - "$1" <<'PYTHON'
import random, socket, sys
held = []
while len(held) < int(sys.argv[1]):
    port = socket.socket()
    try:
        port.bind(("127.0.0.1", random.randrange(17000, 32000)))
        held.append(port)
    except OSError:
        port.close()
print(*(port.getsockname()[1] for port in held))
PYTHON
}

if [ "$command" = stop ]; then stop; exit; fi

trap 'stop; echo "S3 did not start, see $PWD" >&2' ERR
read -r S3_PORT MON_V2 MON_V1 <<<"$(free_ports 3)"
FSID=$(cat /proc/sys/kernel/random/uuid)
OSD=$(cat /proc/sys/kernel/random/uuid)
MON="v2:127.0.0.1:$MON_V2,v1:127.0.0.1:$MON_V1"
cat >ceph.conf <<CONF
[global]
fsid = $FSID
mon initial members = a
mon host = $MON
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
# Without authentication there are no keys to encrypt with.
ms mon client mode = crc
ms mon cluster mode = crc
ms mon service mode = crc
client mount timeout = 60
run dir = $PWD
pid file = $PWD/\$name.pid
log file = $PWD/\$name.log
# The path of a socket may not be long, and this one may lie anywhere.
admin socket =
mon data = $PWD/mon.a
mon allow pool size one = true
mon data avail warn = 2
mon data avail crit = 1
osd data = $PWD/osd.\$id
osd objectstore = memstore
memstore device bytes = 1073741824
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
osd class load list = *
osd class default list = *
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:$S3_PORT
rgw dns name = localhost
rgw thread pool size = 64
CONF
export CEPH_CONF=$PWD/ceph.conf

mkdir mon.a osd.0
monmaptool --create --fsid "$FSID" --addv a "[$MON]" monmap >setup.log
ceph-mon --mkfs -i a --monmap monmap >>setup.log 2>&1
ceph-mon -i a >>setup.log 2>&1
ceph osd new "$OSD" >>setup.log 2>&1
ceph-osd -i 0 --mkfs --osd-uuid "$OSD" >>setup.log 2>&1
ceph-osd -i 0 >>setup.log 2>&1
radosgw -n client.rgw >>setup.log 2>&1
for waited in $(seq 300); do
    (exec 3<>"/dev/tcp/127.0.0.1/$S3_PORT") 2>/dev/null && break
    sleep 0.2
done
radosgw-admin user create --uid=test --display-name=test \
    --access-key=testkey --secret-key=testsecret >>setup.log 2>&1
echo "http://127.0.0.1:$S3_PORT"
