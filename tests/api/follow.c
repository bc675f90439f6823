// SPDX-License-Identifier: MIT
/* follow [--once] [--node NAME] --kubeconfig FILE: the API client and the model
 * of the real tail_lifter.c, without the kernel's side. Prints what the model
 * holds after each change: "services=2 backends=2 node=z1 synced", and behind the
 * node "ranges=10.43.0.0/16,fd43::/112" if there are any. With SPEED=N in
 * the environment its clock runs N times as fast, so that waits of minutes can be seen; with
 * ANEW it lists as if it had done so before: as a stream. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <time.h>

static long speed = 1;

static int fast_clock(clockid_t clock, struct timespec *t)
{
	int r = clock_gettime(clock, t);
	long ns = t->tv_nsec * speed;

	t->tv_sec = t->tv_sec * speed + ns / 1000000000;
	t->tv_nsec = ns % 1000000000;
	return r;
}
#define clock_gettime fast_clock
#ifndef TAIL_LIFTER_C
#define TAIL_LIFTER_C "../../tail_lifter.c"
#endif
#define main tail_lifter_main
#include TAIL_LIFTER_C
#undef main

static struct api *api = &agent.api;
static struct model *model = &agent.model;
static struct resolved resolved;
static char last[400];

/* Counts what stands in the model now. */
static void follow_print(void)
{
	int services = 0, backends = 0;
	struct buf ranges = { 0 }, text = { 0 };
	char now[400], one[INET6_ADDRSTRLEN + 4];
	struct service *s;

	model_settle(model);
	while ((s = model_next_dirty(model)))
		if (s->gone)
			model_forget(model, s);
	TABLE_EACH(&model->services, l) {
		s = (struct service *)l;
		resolve_service(model, s, &resolved);
		services += resolved.n > 0;
		for (int i = 0; i < resolved.n; i++)
			backends += resolved.entries[i].n_backends;
	}
	ranges = model_ranges(model);
	if (ranges.len)
		qsort(ranges.at, ranges.len / sizeof(struct cidr), sizeof(struct cidr), cidr_order);
	for (struct cidr *c = (void *)ranges.at; c < (struct cidr *)(ranges.at + ranges.len); c++)
		buf_printf(&text, "%s%s", text.len ? "," : " ranges=", cidr_text(c, one));
	snprintf(now, sizeof(now), "services=%d backends=%d node=%s%s %s", services, backends,
		 model->places.zone && *model->places.zone ? model->places.zone : "-", text.len ? text.at : "",
		 all_synced(&agent) ? "synced" : "not synced");
	buf_free(&ranges);
	buf_free(&text);
	if (strcmp(now, last))
		puts(strcpy(last, now));
}

int main(int argc, char **argv)
{
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC);

	speed = getenv("SPEED") ? atol(getenv("SPEED")) : 1;
	setvbuf(stdout, NULL, _IOLBF, 0);
	opt.node = "n1";
	for (int i = 1; i < argc; i++)
		if (!strcmp(argv[i], "--once"))
			api->once = true;
		else if (!strcmp(argv[i], "-v"))
			loud = 2;
		else if (!strcmp(argv[i], "--node") && i + 1 < argc)
			opt.node = argv[++i];
		else if (!strcmp(argv[i], "--kubeconfig") && i + 1 < argc)
			opt.kubeconfig = argv[++i];
	if (model_init(model, &opt) || api_open(api)) {
		warn("%s", why);
		return 1;
	}
	for (int k = 0; k < N_KINDS; k++)
		api->watch[k].listed = getenv("ANEW") && !api->once;
	api_start(api, epoll_fd, 100);
	while (!api->failed) {
		int64_t left = (api_deadline(api) - now_ms() + speed - 1) / speed;
		struct epoll_event e[8];
		int n = epoll_wait(epoll_fd, e, 8, left < 0 ? 0 : left > 1000000 ? 1000000 : (int)left);

		for (int i = 0; i < n; i++)
			api_ready(api, model, e[i].data.u32 - 100, e[i].events);
		api_tick(api, now_ms());
		follow_print();
		if (api->once && all_synced(&agent)) {
			api_stop(api);
			return 0;
		}
	}
	warn("%s", api->failed);
	api_stop(api);
	return 1;
}
