# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# advertise.sh: a part of tests/real/run: --advertise with the real tailscaled, whose
# routes a hand, k3s's way of writing them, and restarts take away; and --cleanup, after
# which its preferences are what they were, byte for byte. Expects a lifter that runs
# without the flag, and leaves one.

prefs() { tailscale node debug prefs; }
advertised() { prefs | jq -c .AdvertiseRoutes; }
# quick COMMAND...: it holds within 2 s, or if the machine stands still within eight looks
quick() {
	local until=$((${EPOCHREALTIME/./} + 2000000)) looks=0 said
	until said=$("$@" 2>&1); do
		((++looks < 8 || ${EPOCHREALTIME/./} < until)) || { echo "$said"; echo "still not so: $*"; return 1; }
		sleep 0.1
	done
}
is_advertised() { same "$(advertised)" "$1"; }
both_ranges() { # and before them OTHERS...: kept, in their order
	same "$(advertised | jq -c '.[-2:] | sort')" '["10.43.0.0/16","fd43::/112"]' &&
		same "$(advertised | jq -c '.[:-2]')" "${1:-[]}"
}
has() { advertised | grep -F "\"$1\""; }
advertiser() { # ARGUMENTS...: the lifter with --advertise
	start lifter node env TS_SOCKET="$dir/node.sock" "$TAIL_LIFTER" --iface tailscale0 \
		--kubeconfig "$dir/kubeproxy.kubeconfig" --node node --pin-dir "$pins" --advertise "$@"
}
cleanup() { stop lifter; in_ns node env TS_SOCKET="$dir/node.sock" "$TAIL_LIFTER" --pin-dir "$pins" --cleanup; }
# check_says PATTERN: a line of --check, in its words
check_says() {
	in_ns node env TS_SOCKET="$dir/node.sock" "$TAIL_LIFTER" --check --node node \
		--kubeconfig "$dir/kubeproxy.kubeconfig" --pin-dir "$pins" >"$dir/said" || true
	grep -E "advertised|router|masquerade" "$dir/said"
	grep -qE "$1" "$dir/said"
}
waited() { awk '/^voluntary/ { print $2 }' "/proc/${pid[lifter]}/status"; }
records() { find "$pins" -name 'route*' -printf '%f ' 2>/dev/null; }

echo "# --advertise"
stop lifter
lift --cleanup
check "--check: ranges advertised and approved" soon 10 check_says '^ok +service CIDR advertised'
check "--check: no second router" check_says '^ok +second router'

# what was there by hand stays, whatever we do
before=$(prefs)
: >"$dir/lifter.log"
advertiser
check "advertised by hand: nothing to do" soon 20 grep -q "services and" "$dir/lifter.log"
sleep 1
check "advertised by hand: no record" same "$(records)" ""
cleanup
check "advertised by hand: as before, byte for byte" same "$(prefs)" "$before"

for others in '' 192.168.7.0/24,2001:db8:7::/48; do
	list=$(jq -cn --arg o "$others" '$o | split(",")')
	tailscale node set --advertise-routes="$others"
	before=$(prefs)
	check "before, others are $list: --check says so" check_says '^FIX +service CIDR advertised .*10.43.0.0/16.*is not advertised'
	advertiser
	check "others $list: ours are added" soon 20 both_ranges "$list"
	check "others $list: and the client gets there" soon 20 both tcp 10.43.0.80 80 "$client4"
	tailscale node set --advertise-routes="$others"
	check "others $list: wiped, they are back within 2 s" quick both_ranges "$list"
	tailscale node set --advertise-routes="$others"
	check "others $list: wiped once more, they are back within 2 s" quick both_ranges "$list"
	tailscale node set --advertise-routes=192.168.8.0/24
	check "others $list: as k3s's vpn-auth sets its own: both there" quick both_ranges '["192.168.8.0/24"]'
	sleep 1 # the last repair's answer, and the bus's word of it
	waits=$(waited)
	sleep 5
	check "others $list: nothing happens, nothing wakes it: $(($(waited) - waits)) times in 5 s" test "$(($(waited) - waits))" -le 3
	tailscale node set --hostname=other
	sleep 0.5
	check "another preference changes: nothing else does" both_ranges '["192.168.8.0/24"]'
	tailscale node set --hostname=node --advertise-routes="$others"
	check "others $list: back within 2 s" quick both_ranges "$list"
	tailscale_up node --reset --advertise-routes=10.42.0.0/24
	check "tailscale up --reset, with k3s's pods: back within 2 s" quick both_ranges '["10.42.0.0/24"]'
	tailscale_up node --reset --advertise-routes="$others" --snat-subnet-routes=false
	check "others $list: tailscale up again: back within 2 s" quick both_ranges "$list"
	stop lifter KILL
	check "others $list: killed, they stay" both_ranges "$list"
	check "others $list: --cleanup" cleanup
	check "others $list: --cleanup leaves preferences as before, byte for byte" same "$(prefs)" "$before"
	check "others $list: --cleanup leaves no record" same "$(records)" ""
done

echo "# --advertise: no list at all, --once, ranges that come and go"
in_ns node curl -sS --unix-socket "$dir/node.sock" -X PATCH http://local-tailscaled.sock/localapi/v0/prefs \
	-d '{"AdvertiseRoutesSet":true,"AdvertiseRoutes":null}' >/dev/null
before=$(prefs)
check "before: there is no list" is_advertised null
once() { in_ns node env TS_SOCKET="$dir/node.sock" timeout 20 "$TAIL_LIFTER" --once --advertise --iface tailscale0 \
	--kubeconfig "$dir/kubeproxy.kubeconfig" --node node --pin-dir "$pins" "$@"; }
check "--once: ours are there" once
check "--once: ours are there, and nothing else" both_ranges
advertiser --map 10.143.0.0/16=10.43.0.0/16
check "another range by --map: it is added" soon 20 has 10.143.0.0/16
stop lifter
advertiser
check "without that --map: it goes, and no other" soon 20 both_ranges
check "--cleanup" cleanup
check "--cleanup: no list, byte for byte" same "$(prefs)" "$before"

echo "# --advertise: tailscaled comes and goes"
stop tailscaled-node
advertiser
check "no tailscaled: one line, and all else works" soon 20 grep -q "no tailscaled at .*is it running" "$dir/lifter.log"
sleep 3
check "no tailscaled: one line" same "$(grep -c "no tailscaled at" "$dir/lifter.log")" 1
tailscaled node
check "tailscaled begins: ours are there" soon 10 both_ranges
tailscale node set --advertise-routes=192.168.8.0/24
check "wiped: back within 2 s" quick both_ranges '["192.168.8.0/24"]'
stop tailscaled-node KILL
tailscaled node
check "tailscaled killed, and begun again" soon 10 both_ranges '["192.168.8.0/24"]'
tailscale node set --advertise-routes=
# a pause is at most twice as long as tailscaled was away
check "killed and begun again, wiped: back" soon 15 both_ranges
stop lifter
stop tailscaled-node
status=0
cleanup 2>"$dir/said" || status=$?
cat "$dir/said"
check "--cleanup without tailscaled: exit 0 and one line" same "$status, $(grep -c "no tailscaled at .*10.43.0.0/16" "$dir/said"), $(wc -l <"$dir/said")" "0, 1, 1"
check "--cleanup without tailscaled: nothing is left in bpffs" test ! -e "$pins"
tailscaled node
soon 10 advertised >/dev/null

echo "# --check with tailscaled"
tailscale node set --advertise-routes=10.43.0.0/16,fd43::/112
check "masquerade: off" soon 10 check_says '^hint +masquerade +tailscaled does none.*--snat auto'
tailscale node set --snat-subnet-routes=true
check "masquerade: on" check_says '^ok +masquerade +by tailscaled: pods see'
tailscale node set --snat-subnet-routes=false
tailscale node set --advertise-routes=10.43.0.0/16,fd43::/112,10.144.0.0/16
extra() { in_ns node env TS_SOCKET="$dir/node.sock" "$TAIL_LIFTER" --check --node node --map 10.144.0.0/16=10.43.0.0/16 \
	--kubeconfig "$dir/kubeproxy.kubeconfig" --pin-dir "$pins" | grep -E "$1"; }
check "advertised, not approved" soon 20 extra '^hint +service CIDR advertised .*10.144.0.0/16.*not approved'
tailscale node set --advertise-routes=10.43.0.0/16,fd43::/112
tailscale client set --advertise-routes=10.43.0.0/16
tailscale node set --advertise-routes=fd43::/112 # headscale shows the one that is in use
other=$(headscale nodes list --output json | jq '.[] | select(.given_name == "client") | .id')
headscale nodes approve-routes --identifier "$other" --routes 10.43.0.0/16 >/dev/null
check "second router: which, and what to do" soon 20 check_says '^hint +second router +client has .*10.43.0.0/16.*--map'
headscale nodes approve-routes --identifier "$other" --routes '' >/dev/null
tailscale client set --advertise-routes=
tailscale node set --advertise-routes=10.43.0.0/16,fd43::/112
check "no second router any more" soon 20 check_says '^ok +second router'

lifter
check "all is as it was: both pods answer" soon 20 both tcp 10.43.0.80 80 "$client4"
