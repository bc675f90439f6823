"""Kubernetes objects in few words, and the program's answer in few words."""
import json, os, random, subprocess, sys

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
