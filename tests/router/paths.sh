# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# paths: what routers and hosts say of a path reaches who can make use of it, and is about
# what that one has sent.

watch

for way in $ways; do
	host=${way%:*} family=${way#*:}
	me=$(own "$host" "$family")
	name="$(link "$host"), IPv$family"
	for kind in tcp udp; do
		check "$name $kind: a pod of this node" same "$(talk "$host" ask $kind "$(vip "$family" 11)" 80 | cut -d ' ' -f 1-2)" "pod-a $me"
		check "$name $kind: a pod behind a router" same "$(talk "$host" ask $kind "$(vip "$family" 12)" 80 | cut -d ' ' -f 1-2)" "pod-h $me"
	done
	check "$name: a datagram in fragments, there and back" same "$(talk "$host" ask udp "$(vip "$family" 11)" 80 3300 | cut -d ' ' -f 1-2)" "pod-a $me"
done

### the MTU of a path

# narrow HOST V4 V6 HOW...: a road of MTU 1300; widen: no more
narrow() { route "$1" "$2" "$3" "${@:4}" mtu 1300; }
widen() {
	ip -n "$(world_ns "$1")" route delete "$2"
	ip -n "$(world_ns "$1")" -6 route delete "$3"
}
# too_long NUMBER POD: the client's sockets learn of 1300 from the service they speak with
too_long() {
	local way host family to name errors
	for way in $ways; do
		host=${way%:*} family=${way#*:} to=$(vip "${way#*:}" "$1")
		name="$(link "$host"), IPv$family: $2"
		errors=$(counter node1 icmp_error)
		check "$name: UDP learns the MTU" same "$(talk "$host" mtu udp "$to" 80)" \
			"EMSGSIZE from $to about $to:80, its own words, mtu 1300 1300, as long is answered"
		check "$name: it was an error of ours" test "$(counter node1 icmp_error)" -gt "$errors"
	done
	forget_paths
	for way in $ways; do
		host=${way%:*} family=${way#*:} to=$(vip "${way#*:}" "$1")
		check "$(link "$host"), IPv$family: $2: TCP learns the MTU" same "$(talk "$host" mtu tcp "$to" 80)" \
			"pod-$3 mtu $([ "$host" = client ] && echo 1420 || echo 1500) then 1300"
	done
	forget_paths
}
narrow node1 10.42.0.5 fd42::5 dev cni0
too_long 11 "a narrow road from this node" a
widen node1 10.42.0.5 fd42::5
narrow hop 10.42.9.5 fd42:0:0:9::5 dev cni0
too_long 12 "a narrow road behind a router" h
widen hop 10.42.9.5 fd42:0:0:9::5
watched paths unsure

### errors on the way and at its end

offload off
watch

for way in $ways; do
	host=${way%:*} family=${way#*:}
	me=$(own "$host" "$family") name="$(link "$host"), IPv$family"
	to=$(vip "$family" 12)
	check "$name: TTL exceeded at the node" same "$(talk "$host" ttl 1 "$to" 80)" "EHOSTUNREACH from $to about $to:80, its own words"
	check "$name: TTL exceeded at a router behind it" same "$(talk "$host" ttl 2 "$to" 80)" "EHOSTUNREACH from $to about $to:80, its own words"
	to=$(vip "$family" 16)
	check "$name: nobody listens in the pod" same "$(talk "$host" refused "$to" 80)" "ECONNREFUSED from $to about $to:80, its own words"
	world_run pod-a ./talk.py late 9100 >"$world_dir/late"
	late=$world_pid
	soon 5 grep -q ready "$world_dir/late"
	check "$name: a client that leaves" talk "$host" leave "$(vip "$family" 17)" 80
	wait $late || true
	check "$name: its port unreachable reaches the pod" same "$(tail -n 1 "$world_dir/late")" \
		"ECONNREFUSED from $me about $me:PORT, its own words"
done
watched errors
offload on
