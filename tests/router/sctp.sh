# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# sctp: an INIT finds a pod and its INIT-ACK the client, with their own checksums.

for family in 4 6; do
	for pod in a c; do
		world_run pod-$pod ./sctp.py answer $family 9000 >"$world_dir/sctp-$pod-$family" 2>>"$world_dir/log"
		soon 20 grep -q ready "$world_dir/sctp-$pod-$family"
	done
done
offload off
watch
for way in $ways; do
	host=${way%:*} family=${way#*:} name="$(link "${way%:*}"), IPv${way#*:}, SCTP"
	requests=$(counter node1 request)
	for number in 35 36; do
		to=$(vip "$family" $number)
		check "$name: $to answers" same "$(on "$host" timeout 20 ./sctp.py ask "$to" 9000)" "INIT-ACK from $to"
	done
	check "$name: they were our requests" same "$(($(counter node1 request) - requests))" 2
	check "$name: a port that the service does not have" same "$(on "$host" timeout 20 ./sctp.py ask "$to" 9001)" ECONNREFUSED
done
watched sctp
offload on
