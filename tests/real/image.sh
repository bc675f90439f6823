# SPDX-License-Identifier: MIT
# shellcheck shell=bash
#
# image.sh: a part of tests/real/run: the image of `./build.sh image`, started by podman
# with what the manifests in k3s/ give to it, read from what the API server makes of
# them, and no more; then what teardown.yaml starts. Expects a lifter that runs, and
# leaves one.

### a kubelet of jq

# The RuntimeDefault of containerd: podman's own where that lets bpf(2) through with
# CAP_BPF; older ones (Debian 12's) do so with CAP_SYS_ADMIN alone. Here the rules that
# containerd has take the place of whatever podman's say of the two calls.
seccomp_profile() {
	jq '(.syscalls[] | select(.action == "SCMP_ACT_ERRNO") | .names) -= ["bpf", "perf_event_open"] |
		.syscalls |= map(select(.names != [])) + [
			(("bpf CAP_BPF", "perf_event_open CAP_PERFMON") | split(" ") as [$call, $cap] |
			{names: [$call], action: "SCMP_ACT_ALLOW", args: [], includes: {caps: [$cap]}},
			{names: [$call], action: "SCMP_ACT_ERRNO", errnoRet: 1, errno: "EPERM", args: [], excludes: {caps: [$cap, "CAP_SYS_ADMIN"]}})]' \
		/usr/share/containers/seccomp.json
}

# The flags of podman for the one container of a DaemonSet, a word each, then image and
# arguments. What it does not know it refuses: a test of half a manifest would be none.
container_of() { # FILE
	kubectl apply --dry-run=server -o json -f "$manifests/$1" | jq -r --arg secrets "$secrets" --arg seccomp "$dir/seccomp.json" '
	def only($known): (keys - $known) as $other | if $other != [] then error("unknown here: \($other)") else . end;
	if .items then .items[] else . end | select(.kind == "DaemonSet") | .spec.template.spec | . as $pod |
	only(["automountServiceAccountToken", "containers", "dnsPolicy", "hostNetwork", "nodeSelector", "priorityClassName",
		"restartPolicy", "schedulerName", "securityContext", "serviceAccount", "serviceAccountName",
		"terminationGracePeriodSeconds", "tolerations", "volumes"]) |
	(.volumes | map({key: .name, value: .hostPath.path}) | from_entries) as $path |
	.containers[0] |
	only(["args", "env", "image", "imagePullPolicy", "livenessProbe", "name", "readinessProbe", "resources",
		"securityContext", "terminationMessagePath", "terminationMessagePolicy", "volumeMounts"]) |
	(.securityContext | only(["allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem", "runAsUser", "seccompProfile"])) as $may |
	(if $pod.hostNetwork then "--network=host" else "--network=none" end),
	"--user=\($may.runAsUser)",
	($may.capabilities | (.drop[] | "--cap-drop=\(.)"), (.add[] | "--cap-add=\(.)")),
	(if $may.readOnlyRootFilesystem then "--read-only", "--read-only-tmpfs=false" else empty end),
	(if $may.allowPrivilegeEscalation == false then "--security-opt=no-new-privileges" else empty end),
	(if $may.seccompProfile.type == "RuntimeDefault" then "--security-opt=seccomp=\($seccomp)" else error("seccomp") end),
	"--memory=\(.resources.limits.memory | rtrimstr("i") | ascii_downcase)",
	(.env // [] | .[] | if .valueFrom.fieldRef.fieldPath == "spec.nodeName" then "--env=\(.name)=node" else error("env") end),
	"--env=KUBERNETES_SERVICE_HOST=127.0.0.1", "--env=KUBERNETES_SERVICE_PORT=6444",
	(.volumeMounts[] | "--volume=\($path[.name]):\(.mountPath):\(if .mountPropagation == "HostToContainer" then "rslave" else error("mount") end)"),
	(if $pod.automountServiceAccountToken == false then empty else "--volume=\($secrets):/var/run/secrets/kubernetes.io/serviceaccount:ro" end),
	(.image | if contains("/") then . else "docker.io/library/\(.)" end), # as a container runtime reads it
	.args[]'
}

podman() { in_ns node podman --root "$dir/podman" --runroot "$dir/podman-run" --tmpdir "$dir/podman-tmp" --storage-driver vfs \
	--cgroup-manager cgroupfs --events-backend none --runtime runc "$@"; }
# container NAME FILE [FLAG]: as podman's child, until it ends, without that flag; what it says is in NAME.log
container() {
	local flags
	mapfile -t flags < <(container_of "$2" | grep -vxF -e "${3:-none}")
	podman run --name "$1" --rm --pull never --cgroup-parent /tail_lifter-test --ulimit nofile=20000:20000 --ulimit nproc=20000:20000 \
		"${flags[@]}" >>"$dir/$1.log" 2>&1
}
gone() { fails podman container exists "$1"; }
probe() { # KIND: where the kubelet asks
	kubectl apply --dry-run=client -o json -f "$manifests/tail-lifter.yaml" |
		jq -r --arg kind "$1" '.items[] | select(.kind == "DaemonSet") | .spec.template.spec.containers[0][$kind].httpGet |
			"http://\(.host):\(.port)\(.path)"'
}
is_200() { same "$(in_ns node curl -s --max-time 5 -o "$dir/said" -w '%{http_code}' "$1"; cat "$dir/said")" "200$2"; }

### tail-lifter.yaml

echo "# the image with the manifest's privileges"
if alive lifter; then stop lifter; fi
quietly lift --cleanup
on_host=$pins pins=/sys/fs/bpf/tail_lifter
seccomp_profile >"$dir/seccomp.json"
quietly kubectl apply -f "$manifests/tail-lifter.yaml"
quietly token image
check "podman takes the image" podman load -i "$here/../../dist/tail-lifter.tar"
agent_up() {
	container agent tail-lifter.yaml &
	pid[agent]=$!
	ready_url=$(probe readinessProbe) alive_url=$(probe livenessProbe)
}
agent_pid() { podman inspect -f '{{.State.Pid}}' agent; }
of_agent() { sed -n "s/^$1:[[:space:]]*//p" "/proc/$(agent_pid)/status"; }
memory_limit() { # by cgroups of version 1 or 2
	local group
	group=$(sed -n 's/^[0-9]*:\(memory\|\)://p' "/proc/$(agent_pid)/cgroup" | head -n 1)
	cat "/sys/fs/cgroup/memory$group/memory.limit_in_bytes" 2>/dev/null || cat "/sys/fs/cgroup$group/memory.max"
}
agent_up
check "it is ready" soon 30 is_200 "$ready_url" "ready"
check "it is alive" is_200 "$alive_url" "the loop turns"
check "BPF and NET_ADMIN, and no other capability" same "$(of_agent CapEff) $(of_agent CapBnd) $(of_agent CapAmb)" \
	"0000008000001000 0000008000001000 0000000000000000"
check "seccomp and no new privileges" same "$(of_agent Seccomp) $(of_agent NoNewPrivs)" "2 1"
check "its root is read-only" grep -E '^[0-9]+ [0-9]+ [0-9:]+ [^ ]+ / ro[, ]' "/proc/$(agent_pid)/mountinfo"
check "its memory is limited" same "$(memory_limit)" $((128 << 20))
check "on the host its pins are where they always are" test -e "$pins/svc_map"
check "from the host: --status" status_is '.agent.running and .agent.synced and .node == "node"'
for row in "tcp 10.43.0.80 80 $client4" "tcp fd43::80 80 $client6" "udp 10.43.0.80 53 $client4"; do
	# shellcheck disable=SC2086 # four words
	check "${row% *}: both pods answer" both $row
done
quietly service novel 91
quietly endpoints novel pod-a
check "changes take effect" soon 10 one 10.43.0.91 80 pod-a

quietly podman kill --signal KILL agent
check "killed: it is gone" soon 10 gone agent
check "killed: both pods answer" both tcp 10.43.0.80 80 "$client4"
agent_up
check "another one: it is ready" soon 30 is_200 "$ready_url" "ready"
quietly podman stop -t 5 agent
check "stopped, as a kubelet does: it is gone" soon 10 gone agent
check "stopped: both pods answer" both tcp 10.43.0.80 80 "$client4"
check "it wanted nothing that it may not" fails grep -iE 'denied|not permitted|EPERM' "$dir/agent.log"

# missed FLAG WORDS: it does not do without, and says so
missed() {
	: >"$dir/less.log"
	container less tail-lifter.yaml "$1" &
	soon 60 grep -E "$2" "$dir/less.log" || { cat "$dir/less.log" && podman kill less; return 1; }
	wait $!
	same $? 1
}
check "without BPF: it says so" missed --cap-add=BPF 'CAP_BPF'
check "without NET_ADMIN: it says so" missed --cap-add=NET_ADMIN 'CAP_NET_ADMIN'
check "without the host's bpffs: it says so" missed "--volume=/sys/fs/bpf:/bpf:rslave" 'bpffs'

### teardown.yaml

# The commands of its comment, as they stand there, and beside them what in a cluster a
# DaemonSet controller and a kubelet would do: a pod, its end, and word of both.
recipe() {
	sed -n 's/^#   \( *[k-].*\)/\1/p' "$manifests/teardown.yaml" >"$dir/recipe"
	grep -c '^kubectl' "$dir/recipe"
	(cd "$manifests/.." && "$BASH" -ec "$(declare -p dir cluster); $(declare -f in_ns kubectl); . $dir/recipe")
}
one_node() {
	local pod
	soon 30 kubectl -n kube-system get daemonset tail-lifter-teardown
	sleep 1 # so long there is no pod to wait for
	pod=$(kubectl -n kube-system get daemonset tail-lifter-teardown -o json | jq '.spec.template + {apiVersion: "v1", kind: "Pod"} |
		.metadata += {name: "teardown", namespace: "kube-system"} | .spec.nodeName = "node"')
	kubectl create -f - <<<"$pod"
	kubectl -n kube-system patch daemonset tail-lifter-teardown --subresource=status -p '{"status":{"observedGeneration":1}}'
	container teardown teardown.yaml || code=$?
	kubectl -n kube-system patch pod teardown --subresource=status -p '{"status":{"phase":"Running","containerStatuses":[{
		"name":"tail-lifter","image":"t","imageID":"t","ready":false,"restartCount":1,"state":{"waiting":{"reason":"CrashLoopBackOff"}},
		"lastState":{"terminated":{"exitCode":'"${code:-0}"'}}}]}}'
}
one_node >"$dir/one-node.log" 2>&1 &
check "teardown, by its comment's commands: exit 0" recipe
wait $! || true
quietly kubectl -n kube-system delete pod teardown --force
check "teardown: the container says nothing" same "$(cat "$dir/teardown.log")" ""
check "teardown: bpffs is empty" same "$(find /sys/fs/bpf -mindepth 1 ! -name '*.debug')" ""
check "teardown: no qdisc is left" fails grep clsact <<<"$(in_ns node tc qdisc show)"
check "teardown: nobody answers" unanswered 10.43.0.80
check "teardown, once more: exit 0" container teardown teardown.yaml

soon 10 find /sys/fs/cgroup -depth -type d -path '*/tail_lifter-test*' -exec rmdir {} + || true # podman leaves the parent
quietly kubectl delete service novel
quietly kubectl delete endpointslice novel-ipv4 novel-ipv6
pins=$on_host
lifter
check "all is as it was: both pods answer" soon 20 both tcp 10.43.0.80 80 "$client4"
