#!/bin/sh
# Begins and ends a memcached whose memory is the file DIR/ram, so that memcached.toml can move it:
#
#   sh configs/memcached.sh begin DIR PORT
#   sh configs/memcached.sh end DIR
#
# What memcached (1.5.18 or later) requires of a program that moves its memory:
# - SIGUSR1 must end it: only then does it write DIR/ram.meta, without which it starts empty. It removes that file when
#   it starts again, whether it could use it or not.
# - The copy may have another name and be mapped at another address: memcached adjusts the pointers in it. Size of memory and
#   of items, and all else that ram.meta lists, must not change.
# - It must start in a later second than the one it ended in, by the clock of the host that it starts on; otherwise it starts empty.
# - On any failure it starts empty, rather than not at all: only its log shows whether it took its memory.
set -eu

pid_is_alive() {
    [ -s "$dir/pid" ] && kill -0 "$(cat "$dir/pid")" 2>/dev/null
}

fail() {
    echo "$1" >&2
    exit 1
}

begin() {
    # After an `end` that failed it may still run.
    if pid_is_alive; then return; fi
    rm -f "$dir/pid"
    ended=
    if [ -e "$dir/ram.meta" ]; then ended=$(sed -n 's/^Kstop_time //p' "$dir/ram.meta"); fi
    while [ "$(date +%s)" -le "${ended:-0}" ]; do sleep 0.1; done

    memcached -d -v -u "$(id -un)" -l 127.0.0.1 -p "$1" -U 0 -m 64 -e "$dir/ram" -P "$dir/pid" >"$dir/log" 2>&1
    tries=0
    until pid_is_alive; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || fail "memcached did not begin: $(tail -n 1 "$dir/log")"
        sleep 0.05
    done
    if [ -n "$ended" ] && ! grep -q 'recovery end' "$dir/log"; then
        kill "$(cat "$dir/pid")"
        fail "memcached did not take its memory: $(grep '\[restart\]' "$dir/log" | tail -n 1)"
    fi
}

end() {
    pid=$(cat "$dir/pid")
    kill -USR1 "$pid"
    while [ -e "$dir/pid" ] && kill -0 "$pid" 2>/dev/null; do sleep 0.02; done
    [ -s "$dir/ram.meta" ] || fail "memcached ended, and left no $dir/ram.meta"
}

dir=$(cd "$2" && pwd)
case $1 in
    begin) begin "$3" ;;
    end) end ;;
    *) fail "begin or end?" ;;
esac
