"""Kubernetes objects in few words, and the program's answer in few words."""
import copy, json, os, random, subprocess, sys

BINARY = os.environ.get("TAIL_LIFTER", os.path.join(os.path.dirname(__file__), "../../tail_lifter"))
passed, failed = 0, 0


def service(name="web", ns="default", ip="10.43.0.10", ports=("http:80",), labels=None, created=None, status=None, **spec):
    """ports: "NAME:NUMBER[/PROTOCOL]", or whole objects; ip: one address, or a list (dual stack)."""
    meta = {"name": name, "namespace": ns, "labels": labels or {}}
    if created:
        meta["creationTimestamp"] = created
    if isinstance(ip, list):
        spec.setdefault("clusterIPs", ip)
        spec.setdefault("ipFamilies", ["IPv6" if ":" in a else "IPv4" for a in ip])
        ip = ip[0]
    spec = {"clusterIP": ip, "ports": [port(p) for p in ports], **spec}
    obj = {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {k: v for k, v in spec.items() if v is not ...}}
    if status is not None:  # load-balancer addresses
        obj["status"] = {"loadBalancer": {"ingress": [{"ip": s} if isinstance(s, str) else s for s in status]}}
    return obj


def port(p):
    if not isinstance(p, str):
        return p
    name, _, rest = p.partition(":")
    number, _, protocol = rest.partition("/")
    return {"name": name, "port": int(number), **({"protocol": protocol} if protocol else {})}


def slice(endpoints, of="web", name=None, ns="default", ports=("http:8080",), family="IPv4", labels=None):
    return {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {"name": name or of + "-1", "namespace": ns, "labels": {"kubernetes.io/service-name": of, **(labels or {})}},
            "ports": [port(p) for p in ports], "endpoints": [endpoint(e) for e in endpoints]}


def endpoint(e):
    """"ADDRESS[@NODE][ FLAG...]": flags not-ready, not-serving, terminating, zone=Z, for-node=N."""
    if not isinstance(e, str):
        return e
    where, *flags = e.split()
    address, _, node = where.partition("@")
    out = {"addresses": [address], "conditions": {}}
    if node:
        out["nodeName"] = node
    for f in flags:
        if f.startswith("zone="):
            out.setdefault("hints", {}).setdefault("forZones", []).append({"name": f[5:]})
        elif f.startswith("for-node="):
            out.setdefault("hints", {}).setdefault("forNodes", []).append({"name": f[9:]})
        else:
            out["conditions"][f.removeprefix("not-")] = not f.startswith("not-")
    return out


def node(name="pi4", zone=None):
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone} if zone else {}}}


def run(text, opts=()):
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")
    argv = [BINARY, "--dry-run", "-o", "json", "--from", "-", "--node", "pi4", *opts]
    return subprocess.run(argv, input=text, capture_output=True, timeout=60)


def words(answer):
    """An entry as "NS/NAME PORT PROTOCOL FAMILY SCOPE: FRONTENDS > BACKENDS | EMPTY ...";
    what is usual (port http, TCP, IPv4, internal, reject) is left out; * is a local backend."""
    out = []
    for e in answer["services"]:
        head = [e["namespace"] + "/" + e["name"]]
        head += [x for x, usual in ((repr(e["port"])[1:-1] or '""', "http"), (e["protocol"], "TCP"), (e["family"], "IPv4"), (e["scope"], "internal")) if x != usual]
        back = [b["address"] + "*" * b["local"] for b in e["backends"]]
        tail = [x for x in (e["empty"] if e["empty"] != "reject" else "", "%ds" % e["affinity_seconds"] if e["affinity_seconds"] else "", "from " + ",".join(e["sources"]) if "sources" in e else "") if x]
        out.append(" ".join(head) + ": " + " ".join(e["frontends"]) + " > " + " ".join(back) + ("".join(" | " + t for t in tail)))
        assert (e["scope"] == "load-balancer") == ("sources" in e)
    return [" ".join(o.split()) for o in out]


def verdict(name, flaw):
    global passed, failed
    if flaw:
        failed += 1
        print(f"not ok {name}: {flaw}")
    else:
        passed += 1
        if os.environ.get("V"):
            print(f"ok {name}")


def text_of(objects):
    return "\n".join(json.dumps(o) for o in objects)


def case(name, objects, want, opts=(), note=None):
    """Expects these entries; the same bytes in any order, as one List, indented, byte order mark and all."""
    ways = [text_of(objects)]
    shuffled = objects[:]
    random.Random(name).shuffle(shuffled)
    ways.append(json.dumps({"apiVersion": "v1", "items": shuffled, "kind": "List"}))
    ways.append("\ufeff" + "".join(json.dumps(o, indent=3).replace("\n", "\r\n") for o in reversed(objects)))
    got = [run(w, opts) for w in ways]
    verdict(name, flaw_of(got, want, note))


def flaw_of(got, want, note):
    first = got[0]
    if first.returncode:
        return f"exit {first.returncode}: {first.stderr.decode()}"
    for g in got[1:]:
        if (g.returncode, g.stdout) != (first.returncode, first.stdout):
            return f"another order, another answer: {g.stdout.decode()} {g.stderr.decode()}"
    said = first.stderr.decode()
    if (note or "") not in said or (said and not note):
        return f"said {said!r}"
    have = words(json.loads(first.stdout))
    if have != want:
        return "\n  have " + "\n       ".join(have) + "\n  want " + "\n       ".join(want)


def bad(name, objects, *says, opts=(), code=1):
    """Expects exit 1, nothing on stdout, one line on stderr with these words."""
    got = run(objects if isinstance(objects, (str, bytes)) else text_of(objects), opts)
    line = got.stderr.decode(errors="replace")
    flaw = None
    if got.returncode != code or got.stdout:
        flaw = f"exit {got.returncode}, said {line!r}, printed {got.stdout[:200]!r}"
    elif line.count("\n") != 1 and code == 1:
        flaw = f"not one line: {line!r}"
    elif not all(s in line for s in says):
        flaw = f"said {line!r}"
    verdict(name, flaw)


def good(name, objects, n=None, opts=()):
    """Expects exit 0 (and n entries)."""
    got = run(objects if isinstance(objects, (str, bytes)) else text_of(objects), opts)
    flaw = got.stderr.decode(errors="replace") if got.returncode else None
    if not flaw and n is not None and len(json.loads(got.stdout)["services"]) != n:
        flaw = "\n  have " + "\n       ".join(words(json.loads(got.stdout)))
    verdict(name, flaw)


def but(obj, path, value):
    """The object with one field changed; ... deletes it."""
    obj = copy.deepcopy(obj)
    at, keys = obj, path.split(".") if isinstance(path, str) else path
    for k in keys[:-1]:
        at = at[int(k)] if isinstance(at, list) else at.setdefault(k, {})
    k = int(keys[-1]) if isinstance(at, list) else keys[-1]
    if value is ...:
        del at[k]
    else:
        at[k] = value
    return obj


# --- bad objects: a row is a field and what it must not be
A, B, old = "10.42.0.5@pi4", "10.42.1.6@pi5", "2020-01-01T00:00:00Z"
svc = service(ip=["10.43.0.10", "fd43::a"], externalIPs=["192.168.0.1"], status=["192.168.0.2"], loadBalancerSourceRanges=["10.0.0.0/8"], sessionAffinity="ClientIP",
              sessionAffinityConfig={"clientIP": {"timeoutSeconds": 60}}, created=old, labels={"app": "web"}, type="ClusterIP", internalTrafficPolicy="Cluster", externalTrafficPolicy="Cluster")
ROWS = {
    "metadata": [5, "x", []], "metadata.name": ["", None, 5, ..., {}], "metadata.namespace": [5, []], "metadata.labels": [5, []], "metadata.labels.app": [5, True, {}], "metadata.creationTimestamp": [5],
    "spec": [5, "x", []], "spec.clusterIP": [5, "10.43.0", "x", "10.43.0.256", "10.43.0.10/32", " 10.43.0.10", "1::2::3", "fe80::1%eth0", "0x0a.1.1.1", "10.43.0.10.1"], "spec.clusterIPs": ["x", {}], "spec.clusterIPs.0": [5, "x", "fd43::b"], "spec.clusterIPs.1": ["None", "10.43.0.9"],
    "spec.ipFamilies": ["IPv4", 5], "spec.ipFamilies.0": [5, "IPv6"], "spec.type": [5], "spec.ports": [5, {}, "x"], "spec.ports.0": [5, [], "x"], "spec.ports.0.name": [5, "\ud800"],
    "spec.ports.0.port": [0, -1, 65536, 80.0, 80.5, "80", True, None, ..., [], 99999999999999999999, {}], "spec.ports.0.protocol": ["ICMP", "tcp", "", 6], "spec.externalIPs": ["192.168.0.1"], "spec.externalIPs.0": [5, "x", "192.168.0.1:80"],
    "spec.loadBalancerSourceRanges": ["x"], "spec.loadBalancerSourceRanges.0": [5, "", "10.0.0.0", "10.0.0.0/33", "x/8", "10.0.0.0/-1"], "spec.sessionAffinity": [5], "spec.sessionAffinityConfig": [5], "spec.sessionAffinityConfig.clientIP": [5],
    "spec.sessionAffinityConfig.clientIP.timeoutSeconds": [0, 86401, "60", 60.0, -5], "spec.internalTrafficPolicy": [5], "spec.externalTrafficPolicy": [True], "status": [5, []], "status.loadBalancer": [5], "status.loadBalancer.ingress": [5, {}],
    "status.loadBalancer.ingress.0": ["x"], "status.loadBalancer.ingress.0.ip": [5, "x"], "status.loadBalancer.ingress.0.ipMode": [5],
}
SLICE = {
    "metadata.name": ["", ...], "metadata.labels.app": [5], "metadata.labels": [[]], "addressType": [5], "ports": [5, {}], "ports.0": [5], "ports.0.name": [5], "ports.0.port": [-1, 65536, "x", 1.0], "ports.0.protocol": ["X", 5],
    "endpoints": [5, {}], "endpoints.0": [5, "x", []], "endpoints.0.addresses": ["x", {}], "endpoints.0.addresses.0": [5, "x"], "endpoints.0.conditions": [5, []], "endpoints.0.conditions.ready": [1, "true"], "endpoints.0.conditions.serving": [0], "endpoints.0.conditions.terminating": ["x"],
    "endpoints.0.nodeName": [5, "x" * 254], "endpoints.0.hints": [5], "endpoints.0.hints.forZones": [5, {}], "endpoints.0.hints.forZones.0": [5], "endpoints.0.hints.forZones.0.name": [5], "endpoints.0.hints.forNodes": [5], "endpoints.0.hints.forNodes.0": ["x"], "endpoints.0.hints.forNodes.0.name": [5],
}
NODE = {"metadata": [5], "metadata.name": [5, ""], "metadata.labels": [5], ("metadata", "labels", "topology.kubernetes.io/zone"): [5, []]}
slc = slice([A + " zone=z1 for-node=pi4", B], labels={"app": "x"})


def wrong():
    """(object, path of the field, what it must not be), of all kinds."""
    for obj, rows in ((svc, ROWS), (slc, SLICE), (node(zone="z1"), NODE)):
        for path, values in rows.items():
            for value in values:
                yield obj, path, value
