# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# mss: what a SYN and a SYN-ACK promise to take fits through the VPN, whatever the ends think.

# mss HOST FAMILY IN-POD AT-CLIENT: of SYN and SYN-ACK, where each of them has passed or will
mss() {
	local host pid=()
	rm -f "$world_dir"/mss-*
	for host in "pod-a eth0 8080" "$1 vpn1 80"; do
		# shellcheck disable=SC2086 # words
		talk "${host%% *}" mss ${host#* } >"$world_dir/mss-${host%% *}" &
		pid+=($!)
		soon 5 grep -q ready "$world_dir/mss-${host%% *}" || return 1
	done
	talk "$1" ask tcp "$(vip "$2" 11)" 80
	wait "${pid[@]}" || true
	same "$(tail -n 1 "$world_dir/mss-pod-a"), $(tail -n 1 "$world_dir/mss-$1")" "$3, $4"
}
# mtus MTU-OF-THE-CLIENTS MTU-OF-THE-NODE
mtus() {
	ip -n "$(world_ns client)" link set vpn1 mtu "$1"
	ip -n "$(world_ns laptop)" link set vpn1 mtu "$1"
	ip -n "$(world_ns node1)" link set tailscale0 mtu "$2"
	ip -n "$(world_ns node1)" link set vpn0 mtu "$2"
	forget_paths
}

watch
mtus 1400 1400
for way in $ways; do
	host=${way%:*} family=${way#*:} less=$([ "${way#*:}" = 4 ] && echo 40 || echo 60)
	name="$(link "$host"), IPv$family, MSS"
	check "$name: pods whose MTU is larger than the VPN's" soon 10 mss "$host" "$family" \
		"SYN $((1400 - less)) SYN-ACK $((1450 - less))" "SYN $((1400 - less)) SYN-ACK $((1400 - less))"
done
mtus 1500 1280
clamped=$(counter node1 mss_clamped)
for way in $ways; do
	host=${way%:*} family=${way#*:} less=$([ "${way#*:}" = 4 ] && echo 40 || echo 60)
	name="$(link "$host"), IPv$family, MSS"
	check "$name: a client whose MTU is larger than the VPN's, which has changed" soon 10 mss "$host" "$family" \
		"SYN $((1280 - less)) SYN-ACK $((1450 - less))" "SYN $((1500 - less)) SYN-ACK $((1280 - less))"
	check "$name: a large upload comes through" same "$(talk "$host" mtu tcp "$(vip "$family" 11)" 80 | cut -d ' ' -f 1)" pod-a
done
check "MSS: they were counted" test $(($(counter node1 mss_clamped) - clamped)) -ge 16
watched mss unsure
mtus 1500 1500
ip -n "$(world_ns client)" link set vpn1 mtu 1420
ip -n "$(world_ns node1)" link set tailscale0 mtu 1420
