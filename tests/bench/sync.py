#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""sync.py: the two halves of tests/bench/sync; tests/bench/packet uses the first.

load SIZE ETCD [POD...]: through the API server 10,000 services would take minutes. They
    are written straight into etcd, as JSON (the API server reads that as well as its own
    protobuf), with what real objects carry: managedFields, targetRefs, IPAddresses.
    All that an earlier load wrote goes first. With PODs (addresses) these are the
    endpoints of every service, by UDP, service n's at port 10000 + n.

measure SIZE DIR CLUSTER TAIL_LIFTER ROUNDS EVENTS: in turns, per program
    first sync  from exec until the maps (agent_map says synced) or the rules (kube-proxy's
                own time stamp) hold everything
    read alone  what that would take if nothing were done with it: the two lists are read at
                once, in pages of 500 like the lifter does
    memory      VmRSS, and its anonymous part, 2 s later; the highest ever was VmHWM
    CPU         user and system time until then, its children's included
    event       from the moment an EndpointSlice is sent to the API until the kernel has it:
                svc_map's entry has changed; nf_tables has announced a new generation.
                That is the API server's time as well: the median of its answer is printed.
    inside      the agent alone, by the kernel's own trace of its system calls (tracefs): from
                epoll_wait's return with news to the end of its last bpf(2) before the next
    maps        what they take of the kernel's memory
"""
import base64, concurrent.futures, ctypes, http.client, itertools, json, os, platform, re, socket, ssl
import statistics, struct, subprocess, sys, time, urllib.parse, urllib.request


def address(n, second):
    return f"10.{second + (n >> 16)}.{n >> 8 & 255}.{n & 255}"


# --- load ---------------------------------------------------------------------

def managed(who, *fields):
    return [{"manager": who, "operation": "Update", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z",
             "fieldsType": "FieldsV1", "fieldsV1": {"f:" + f: {} for f in fields}}]


def meta(name, n, kind, **more):
    return {"name": name, "uid": f"{kind:08d}-0000-4000-8000-{n:012d}", "generation": 1,
            "creationTimestamp": "2026-01-01T00:00:00Z", **more}


def objects(services, endpoints, pods):
    protocol = "UDP" if pods else "TCP"
    for n in range(services):
        name, ip = f"service-{n:05d}", address(n + 1024, 43)
        labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "bench"}
        yield f"services/specs/default/{name}", {
            "kind": "Service", "apiVersion": "v1",
            "metadata": meta(name, n, 1, namespace="default", labels=labels, managedFields=managed(
                "kubectl", "metadata", "spec", "status")),
            "spec": {"ports": [{"name": "http", "protocol": protocol, "port": 80, "targetPort": "http"}],
                     "selector": {"app": name}, "clusterIP": ip, "clusterIPs": [ip], "type": "ClusterIP",
                     "sessionAffinity": "None", "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
                     "internalTrafficPolicy": "Cluster"}, "status": {"loadBalancer": {}}}
        yield f"ipaddresses/{ip}", {
            "kind": "IPAddress", "apiVersion": "networking.k8s.io/v1",
            "metadata": meta(ip, n, 3, labels={"ipaddress.kubernetes.io/ip-family": "IPv4",
                                               "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io"}),
            "spec": {"parentRef": {"resource": "services", "namespace": "default", "name": name}}}
        piece = slice_of(n, endpoints)
        if pods:
            piece["ports"][0] |= {"protocol": protocol, "port": 10000 + n}
            for endpoint, pod in zip(piece["endpoints"], pods, strict=True):
                endpoint["addresses"] = [pod]
        yield f"endpointslices/default/{name}-abcde", piece


def slice_of(n, endpoints, port=8080):
    name = f"service-{n:05d}"
    owner = [{"apiVersion": "v1", "kind": "Service", "name": name, "controller": True, "blockOwnerDeletion": True,
              "uid": f"00000001-0000-4000-8000-{n:012d}"}]
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "bench",
              "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
              "kubernetes.io/service-name": name}
    return {
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": meta(f"{name}-abcde", n, 2, namespace="default", generateName=name + "-", labels=labels,
                         ownerReferences=owner, managedFields=managed(
                             "kube-controller-manager", "addressType", "endpoints", "metadata", "ports")),
        "addressType": "IPv4", "ports": [{"name": "http", "protocol": "TCP", "port": port}],
        "endpoints": [{"addresses": [address(n * endpoints + e + 256, 100)],
                       "conditions": {"ready": True, "serving": True, "terminating": False},
                       "nodeName": f"node{e % 20}", "targetRef": {
                           "kind": "Pod", "namespace": "default", "name": f"{name}-6d4b75cb6d-{e:05d}",
                           "uid": f"00000004-0000-4000-8000-{n * endpoints + e:012d}"}} for e in range(endpoints)]}


def load(size, etcd, *pods):
    services, endpoints = map(int, size.split("x"))
    code = lambda s: base64.b64encode(s.encode()).decode()
    began = time.time()

    def post(path, body):
        ask = urllib.request.Request(f"{etcd}/v3/kv/{path}", json.dumps(body).encode())
        urllib.request.urlopen(ask, timeout=60).read()

    for old in "services/specs/default/service-", "ipaddresses/10.43", "endpointslices/default/service-":
        old = "/registry/" + old
        post("deleterange", {"key": code(old), "range_end": code(old[:-1] + chr(ord(old[-1]) + 1))})
    puts = [{"requestPut": {"key": code("/registry/" + key), "value": code(json.dumps(value))}}
            for key, value in objects(services, endpoints, pods)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: post("txn", {"success": puts[i:i + 120]}), range(0, len(puts), 120)))
    print(f"# {services} services with {services * endpoints} endpoints, in etcd after {time.time() - began:.1f} s")


# --- measure ------------------------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)
BPF = {"x86_64": 321, "aarch64": 280}.get(platform.machine(), 386)


class Map:
    """A pinned map: looks one key up."""

    def __init__(self, path, key, value_size):
        self.path, self.value = ctypes.create_string_buffer(path.encode()), ctypes.create_string_buffer(value_size)
        self.key = ctypes.create_string_buffer(key, len(key))
        attr = struct.pack("QII", ctypes.addressof(self.path), 0, 0)
        self.fd = libc.syscall(BPF, 7, attr, len(attr))
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), path)
        self.attr = struct.pack("IIQQQ", self.fd, 0, ctypes.addressof(self.key), ctypes.addressof(self.value), 0)

    def get(self):
        return self.value.raw if not libc.syscall(BPF, 1, self.attr, len(self.attr)) else b""

    def close(self):
        os.close(self.fd)


class Program:
    def start(self, *command):
        self.began = time.time()
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.pid = self.process.pid

    def wait(self, what, seconds, pause):
        until = time.time() + seconds
        while not (got := what()):
            if time.time() > until or self.process.poll() is not None:
                sys.exit(f"{self.name}: no sync within {seconds} s")
            time.sleep(pause)
        return got

    def figures(self):
        status = dict(line.split(":", 1) for line in open(f"/proc/{self.pid}/status"))
        stat = open(f"/proc/{self.pid}/stat").read().rsplit(")", 1)[1].split()
        kib = lambda key: int(status[key].split()[0])
        return {"CPU s": sum(map(int, stat[11:15])) / os.sysconf("SC_CLK_TCK"), "RSS MiB": kib("VmRSS") / 1024,
                "anonymous MiB": kib("RssAnon") / 1024, "highest MiB": kib("VmHWM") / 1024}


class Lifter(Program):
    name, pins = "tail_lifter", "/sys/fs/bpf/tail_lifter-bench"

    def first_sync(self):
        self.start(lifter, "--iface", "vpn0", "--node", "node", "--kubeconfig", f"{dir}/kubeproxy.kubeconfig",
                   "--pin-dir", self.pins)
        agent = []

        def synced():
            if not agent:
                try:
                    agent.append(Map(self.pins + "/agent_map", b"\0" * 4, 848))
                except OSError:
                    return 0
            return struct.unpack_from("II", agent[0].get() or b"\0" * 8) == (self.pid, 1) and time.time()

        return self.wait(synced, 120, 0.002) - self.began

    def watch(self, n):
        ip = socket.inet_aton(address(n + 1024, 43))
        self.map = Map(self.pins + "/svc_map", b"\0" * 10 + b"\xff\xff" + ip + struct.pack("!H", 80) + b"\x06\0", 32)
        self.was = self.map.get()[:8]

    def changed(self, until):
        while time.time() < until:
            if self.map.get()[:8] != self.was:
                return time.time()
            time.sleep(0.0001)

    def unwatch(self):
        self.map.close()

    def maps(self):
        """Bytes of the kernel's memory that its maps take."""
        of = {}
        for fd in os.listdir(f"/proc/{self.pid}/fdinfo"):
            info = dict(line.split(":", 1) for line in open(f"/proc/{self.pid}/fdinfo/{fd}") if ":" in line)
            if "map_id" in info:
                of[info["map_id"]] = int(info["memlock"])
        return sum(of.values())

    def stop(self):
        self.process.terminate()
        self.process.wait()
        subprocess.run([lifter, "--cleanup", "--pin-dir", self.pins], check=True)


class KubeProxy(Program):
    name, pause = "kube-proxy", 1.2  # it waits a second between two syncs; so do we

    def first_sync(self):
        self.start(f"{cluster}/kube-proxy", f"--kubeconfig={dir}/kubeproxy.kubeconfig", "--proxy-mode=nftables",
                   "--hostname-override=node", "--conntrack-max-per-core=0", "--conntrack-min=0")

        def synced():
            try:
                text = urllib.request.urlopen("http://127.0.0.1:10249/metrics", timeout=5).read().decode()
            except OSError:
                return 0
            at = re.findall(r'^kubeproxy_sync_proxy_rules_last_timestamp_seconds(?:{.*IPv4.*})? (\S+)', text, re.M)
            return max(map(float, at), default=0)

        return self.wait(synced, 300, 0.25) - self.began

    def watch(self, n):
        self.netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
        self.netlink.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE
        self.netlink.bind((0, 0))
        self.netlink.setsockopt(270, 1, 7)  # NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTABLES

    def changed(self, until):
        self.netlink.settimeout(until - time.time())
        try:
            self.netlink.recv(1 << 16)
            return time.time()
        except OSError:
            return None

    def unwatch(self):
        self.netlink.close()

    def stop(self):
        self.process.terminate()
        self.process.wait()
        subprocess.run([f"{cluster}/kube-proxy", "--cleanup"], stdout=log, stderr=log)


class Api:
    def __init__(self):
        tls = ssl.create_default_context(cafile=f"{dir}/server-ca.crt")
        tls.load_cert_chain(f"{dir}/admin.crt", f"{dir}/admin.key")
        self.http = http.client.HTTPSConnection("127.0.0.1", 6444, context=tls)
        self.http.connect()
        self.http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    ports = itertools.count(9000)

    def touch(self, n):
        """Changes service n's slice; returns when it was sent."""
        body = json.dumps(slice_of(n, endpoints, next(self.ports)))  # never the same
        began = time.time()
        self.http.request("PUT", f"/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/service-{n:05d}-abcde",
                          body, {"Content-Type": "application/json"})
        return began

    def answered(self):
        answer = self.http.getresponse()
        text = answer.read()
        if answer.status != 200:
            sys.exit(f"PUT: {answer.status} {text[:300]}")
        return time.time()


def read_pages(what):
    api, more = Api(), ""
    while more is not None:
        api.http.request("GET", f"/{what}?limit=500{more}")
        answer = api.http.getresponse()
        text = answer.read()
        if answer.status != 200:
            sys.exit(f"GET {what}: {answer.status} {text[:300]}")
        token = re.search(rb'"continue":"([^"]+)"', text[:1000])
        more = "&continue=" + urllib.parse.quote(token[1].decode()) if token else None


def read_alone():
    """Seconds."""
    began = time.time()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(read_pages, ("api/v1/services", "apis/discovery.k8s.io/v1/endpointslices")))
    return time.time() - began


def events(program, n):
    """Seconds from sending to the kernel, and to the API's answer; for two minutes at most."""
    api, took, answers, until = Api(), [], [], time.time() + 120
    for i in range(n):
        if time.time() > until:
            break
        at = i * 7919 % services
        program.watch(at)
        began = api.touch(at)
        there = program.changed(began + 60) or float("inf")
        program.unwatch()
        took.append(there - began)
        answers.append(api.answered() - began)
        time.sleep(getattr(program, "pause", 0.02))
    return took, answers


def inside(program, n):
    """Seconds of the agent alone; none if the kernel cannot trace."""
    trace = f"{dir}/trace"
    os.makedirs(trace, exist_ok=True)
    subprocess.run(["mount", "-t", "tracefs", "tracefs", trace], stderr=log)
    if not os.path.exists(f"{trace}/events/syscalls"):
        return []
    own = f"{trace}/instances/{os.path.basename(lifter)}"  # a buffer of our own, with one program in it
    os.mkdir(own)

    def say(file, what):
        with open(f"{own}/{file}", "w") as f:
            f.write(what)

    try:
        say("buffer_size_kb", "4096")
        for call in "epoll_wait", "epoll_pwait", "bpf":
            if os.path.exists(f"{own}/events/syscalls/sys_exit_{call}"):
                say(f"events/syscalls/sys_exit_{call}/filter", f'comm == "{os.path.basename(lifter)[:15]}"')
                say(f"events/syscalls/sys_exit_{call}/enable", "1")
        events(program, n)
        time.sleep(0.1)
        say("tracing_on", "0")
        lines = open(f"{own}/trace").readlines()
    finally:
        os.rmdir(own)
    took, woke, end = [], 0, 0
    for line in lines:
        if not (m := re.search(r" (\d+\.\d+): sys_(\w+) -> 0x(\w+)", line)):
            continue
        if m[2] == "bpf":
            end = float(m[1])
            continue
        if woke and end:
            took.append(end - woke)
        woke, end = int(m[3], 16) and float(m[1]), 0
    return took


# DESIGN.md's, for the sizes it names
BUDGETS = {"10000x10": {"first sync s": 1.5, "RSS MiB": 10, "inside ms": 1}, "100x2": {"RSS MiB": 1}}


def judged(key, value):
    most = BUDGETS.get(f"{services}x{endpoints}", {}).get(key)
    return f"  budget {most}: {'kept' if value <= most else 'missed'}" if most else ""


def spread(seconds):
    seconds = sorted(seconds)
    return f"{statistics.median(seconds) * 1e3:.2f} / {seconds[int(len(seconds) * 0.99)]  * 1e3:.2f}"


def measure(rounds, n):
    found = {Lifter: [], KubeProxy: []}
    texts = {Lifter: {}, KubeProxy: {}}
    alone = []
    for i in range(rounds):
        alone.append(read_alone())
        for kind in found:
            program = kind()
            row = {"first sync s": program.first_sync()}
            time.sleep(2)
            row |= program.figures()
            found[kind].append(row)
            print(f"# {program.name}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()), flush=True)
            if i == rounds - 1:
                took, answers = events(program, n)
                texts[kind]["event ms, median / 99 % (n)"] = f"{spread(took)} ({len(took)})"
                texts[kind]["  of it until the API answers"] = spread(answers)
                if kind is Lifter and (within := inside(program, n)):
                    late = sorted(within)[int(len(within) * 0.99)] * 1e3
                    texts[kind]["  of it inside the agent, n"] = f"{spread(within)} ({len(within)})"
                    texts[KubeProxy]["  of it inside the agent, n"] = judged("inside ms", late)
                texts[kind]["RSS MiB after the events"] = f"{program.figures()['RSS MiB']:.2f}"
                if kind is Lifter:
                    texts[kind]["maps MiB"] = f"{program.maps() / (1 << 20):.2f}"
            program.stop()
    print(f"{f'{services} services, {services * endpoints} endpoints':44}{'tail_lifter':>24}{'kube-proxy':>24}  ratio")
    for key in found[Lifter][0]:
        ours, theirs = (statistics.median(row[key] for row in found[kind]) for kind in found)
        print(f"{key:44}{ours:24.2f}" + (f"{theirs:24.2f}  {ours / theirs:.3f}" if theirs else "") + judged(key, ours))
    print(f"{'read alone s':44}{statistics.median(alone):24.2f}")
    for key in texts[Lifter]:
        print(f"{key:44}{texts[Lifter][key]:>24}{texts[KubeProxy].get(key, ''):>24}")


if sys.argv[1] == "load":
    load(*sys.argv[2:])
else:
    size, dir, cluster, lifter = sys.argv[2:6]
    services, endpoints = map(int, size.split("x"))
    log = open(f"{dir}/bench.log", "a")
    measure(int(sys.argv[6]), int(sys.argv[7]))
