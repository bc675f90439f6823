// SPDX-License-Identifier: MIT
/* neighbour OBJECT IFACE ingress|egress first|last|clsact PORT
 *
 * Attaches neighbour.bpf.c before everybody (tcx), behind everybody (tcx), or by clsact and
 * cls_bpf; stays until SIGTERM, takes it off and prints "seen N dropped N". */
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <err.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>

static void nothing(int sig)
{
	(void)sig;
}

static int is_ethernet(const char *iface)
{
	struct ifreq ifr = { 0 };
	int s = socket(AF_INET, SOCK_DGRAM, 0);

	snprintf(ifr.ifr_name, sizeof(ifr.ifr_name), "%s", iface);
	if (s < 0 || ioctl(s, SIOCGIFHWADDR, &ifr))
		err(1, "%s", iface);
	return ifr.ifr_hwaddr.sa_family == ARPHRD_ETHER;
}

/* A map of the object's globals: its only member's bytes */
static void *globals(struct bpf_object *obj, const char *section)
{
	struct bpf_map *map;
	size_t size;

	bpf_object__for_each_map(map, obj)
		if (strstr(bpf_map__name(map), section))
			return bpf_map__initial_value(map, &size);
	errx(1, "no %s", section);
}

int main(int argc, char **argv)
{
	LIBBPF_OPTS(bpf_tcx_opts, tcx);
	LIBBPF_OPTS(bpf_tc_hook, hook);
	LIBBPF_OPTS(bpf_tc_opts, tc, .handle = 1, .priority = 1);
	struct bpf_object *obj;
	struct bpf_program *prog;
	uint32_t *wish;
	uint64_t *n;
	sigset_t none, set;
	int egress, ours = 0;

	if (argc != 6)
		errx(2, "usage: neighbour OBJECT IFACE ingress|egress first|last|clsact PORT");
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	sigemptyset(&none);
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGTERM, nothing);
	egress = !strcmp(argv[3], "egress");
	obj = bpf_object__open_file(argv[1], NULL);
	if (!obj)
		errx(1, "%s", argv[1]);
	prog = bpf_object__next_program(obj, NULL);
	wish = globals(obj, ".rodata");
	wish[0] = atoi(argv[5]);
	wish[1] = is_ethernet(argv[2]) ? 14 : 0;
	if (!strcmp(argv[4], "clsact")) /* tc's, older than tcx */
		bpf_program__set_expected_attach_type(prog, 0);
	else
		bpf_program__set_expected_attach_type(prog, egress ? BPF_TCX_EGRESS : BPF_TCX_INGRESS);
	if (bpf_object__load(obj))
		errx(1, "it does not load");
	n = globals(obj, ".bss");
	if (!strcmp(argv[4], "clsact")) {
		hook.ifindex = if_nametoindex(argv[2]);
		hook.attach_point = BPF_TC_INGRESS | BPF_TC_EGRESS;
		tc.prog_fd = bpf_program__fd(prog);
		ours = !bpf_tc_hook_create(&hook);
		hook.attach_point = egress ? BPF_TC_EGRESS : BPF_TC_INGRESS;
		if (bpf_tc_attach(&hook, &tc))
			errx(1, "tc does not take it");
	} else {
		tcx.flags = !strcmp(argv[4], "first") ? BPF_F_BEFORE : BPF_F_AFTER;
		if (!bpf_program__attach_tcx(prog, if_nametoindex(argv[2]), &tcx))
			errx(1, "tcx does not take it");
	}
	puts("ready");
	fflush(stdout);
	sigsuspend(&none);
	if (!strcmp(argv[4], "clsact")) {
		tc.prog_fd = tc.prog_id = 0;
		bpf_tc_detach(&hook, &tc);
		hook.attach_point = BPF_TC_INGRESS | BPF_TC_EGRESS;
		if (ours)
			bpf_tc_hook_destroy(&hook);
	}
	printf("seen %llu dropped %llu\n", (unsigned long long)n[0], (unsigned long long)n[1]);
	return 0;
}
