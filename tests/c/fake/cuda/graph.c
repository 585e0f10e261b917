/* The stand-in's capture, graphs and user objects. */
#include "driver.h"

#include <stdlib.h>
#include <string.h>

struct fake_node {
  struct fake_op op;
  struct fake_node **after;
  int nafter, index;
};
struct fake_object {
  hfr_cu_host_fn destroy;
  void *value;
  _Atomic int references;
};
struct CUgraph_st {
  struct fake_node **node;
  int n;
  struct fake_object **object;
  int nobjects;
};
struct fake_exec {
  struct CUgraph_st *graph; /* a copy of the nodes' list; nodes are never freed */
  pthread_mutex_t running;
  char *done;
  int launches, destroyed;
};
_Thread_local int fake_capture_mode = HFR_CU_MODE_GLOBAL;
static _Atomic size_t objects; /* user objects that are not destroyed yet */

/* ---------------------------------------------------------------- user objects */

static void *destroy_object(void *arg) {
  struct fake_object *o = arg;
  fake_in_host_function = 1; /* it must not call the driver either */
  o->destroy(o->value);
  free(o);
  objects--;
  return NULL;
}

/* For tests of this library alone. */
EXPORT size_t fake_cuda_objects(void);
EXPORT size_t fake_cuda_objects(void) { return objects; }

static void drop(struct fake_object *o, int count) {
  pthread_t thread;
  if (atomic_fetch_sub(&o->references, count) > count) return;
  if (pthread_create(&thread, NULL, destroy_object, o)) fake_die("no thread for a destructor");
  pthread_detach(thread);
}

EXPORT hfr_cu_result cuUserObjectCreate(hfr_cu_object *object, void *value, hfr_cu_host_fn destroy, unsigned references,
                                        unsigned flags) {
  ENTER("cuUserObjectCreate");
  if (flags != HFR_CU_OBJECT_NO_SYNC || !references) return HFR_CU_INVALID_VALUE;
  struct fake_object *o = calloc(1, sizeof *o);
  *o = (struct fake_object){destroy, value, (int)references};
  *object = (hfr_cu_object)o;
  objects++;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuUserObjectRelease(hfr_cu_object object, unsigned count) {
  ENTER("cuUserObjectRelease");
  drop((struct fake_object *)object, (int)count);
  return HFR_CU_SUCCESS;
}

static void hold(struct CUgraph_st *g, struct fake_object *o) {
  g->object = realloc(g->object, (size_t)(g->nobjects + 1) * sizeof *g->object);
  g->object[g->nobjects++] = o;
}

EXPORT hfr_cu_result cuGraphRetainUserObject(hfr_cu_graph graph, hfr_cu_object object, unsigned count, unsigned flags) {
  ENTER("cuGraphRetainUserObject");
  struct fake_object *o = (struct fake_object *)object;
  if (!graph || count != 1) return HFR_CU_INVALID_VALUE;
  if (flags != HFR_CU_OBJECT_MOVE) o->references++;
  LOCK();
  hold(graph, o);
  UNLOCK();
  return HFR_CU_SUCCESS;
}

/* ---------------------------------------------------------------- capture */

static void add_tip(struct fake_node ***list, int *n, struct fake_node *node) {
  for (int i = 0; i < *n; i++)
    if ((*list)[i] == node) return;
  *list = realloc(*list, (size_t)(*n + 1) * sizeof **list);
  (*list)[(*n)++] = node;
}

hfr_cu_result fake_record(struct CUstream_st *s, const struct fake_op *op) {
  struct CUgraph_st *g = s->capture->graph;
  if (s->capture->broken) return HFR_CU_CAPTURE_INVALIDATED;
  struct fake_node *node = calloc(1, sizeof *node);
  node->op = *op;
  node->op.stream = s;
  node->after = s->tip;
  node->nafter = s->ntips;
  node->index = g->n;
  g->node = realloc(g->node, (size_t)(g->n + 1) * sizeof *g->node);
  g->node[g->n++] = node;
  s->tip = NULL;
  s->ntips = 0;
  add_tip(&s->tip, &s->ntips, node);
  return HFR_CU_SUCCESS;
}

void fake_mark(struct CUstream_st *s, struct CUevent_st *event) {
  free(event->node);
  event->node = NULL;
  event->nnodes = 0;
  for (int i = 0; i < s->ntips; i++) add_tip(&event->node, &event->nnodes, s->tip[i]);
  event->capture = s->capture;
  event->capture_id = s->capture->id;
}

static int is_running(const struct fake_capture *c, uint64_t id) {
  for (struct fake_capture *other = fake.captures; other; other = other->next)
    if (other == c) return c->id == id;
  return 0;
}

hfr_cu_result fake_join(struct CUstream_st *s, struct CUevent_st *event) {
  if (!is_running(event->capture, event->capture_id)) return HFR_CU_CAPTURE_ISOLATION; /* an event of a capture that is over */
  if (s->capture && s->capture != event->capture) {
    s->capture->broken = event->capture->broken = 1;
    return HFR_CU_CAPTURE_MERGE;
  }
  s->capture = event->capture;
  for (int i = 0; i < event->nnodes; i++) add_tip(&s->tip, &s->ntips, event->node[i]);
  return HFR_CU_SUCCESS;
}

hfr_cu_result fake_unsafe(void) {
  hfr_cu_result r = HFR_CU_SUCCESS;
  if (fake_capture_mode == HFR_CU_MODE_RELAXED) return r;
  LOCK();
  for (struct fake_capture *c = fake.captures; c; c = c->next) {
    int mine = pthread_equal(c->thread, pthread_self());
    if (c->mode == HFR_CU_MODE_RELAXED || (!mine && (c->mode != HFR_CU_MODE_GLOBAL || fake_capture_mode != HFR_CU_MODE_GLOBAL)))
      continue;
    c->broken = 1;
    r = HFR_CU_CAPTURE_UNSUPPORTED;
  }
  UNLOCK();
  return r;
}

EXPORT hfr_cu_result cuThreadExchangeStreamCaptureMode(int *mode) {
  ENTER("cuThreadExchangeStreamCaptureMode");
  int old = fake_capture_mode;
  fake_capture_mode = *mode;
  *mode = old;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuStreamBeginCapture_v2(hfr_cu_stream stream, int mode) {
  static uint64_t ids;
  ENTER("cuStreamBeginCapture");
  LOCK();
  struct CUstream_st *s = fake_stream(stream);
  hfr_cu_result r = !s || s == s->context->legacy || s->capture ? HFR_CU_CAPTURE_UNSUPPORTED : HFR_CU_SUCCESS;
  if (!r) {
    struct fake_capture *c = calloc(1, sizeof *c);
    *c = (struct fake_capture){fake.captures, ++ids, s, mode, 0, pthread_self(), calloc(1, sizeof *c->graph)};
    fake.captures = s->capture = c;
  }
  UNLOCK();
  return r;
}

static int comes_before(const struct fake_node *node, struct fake_node **tip, int n) {
  for (int i = 0; i < n; i++)
    if (tip[i] == node || comes_before(node, tip[i]->after, tip[i]->nafter)) return 1;
  return 0;
}

static void leave(struct CUstream_st *s) {
  s->capture = NULL;
  s->tip = NULL; /* a node may own the list */
  s->ntips = 0;
}

EXPORT hfr_cu_result cuStreamEndCapture(hfr_cu_stream stream, hfr_cu_graph *graph) {
  ENTER("cuStreamEndCapture");
  LOCK();
  struct CUstream_st *s = fake_stream(stream);
  struct fake_capture *c = s->capture;
  hfr_cu_result r = !c || c->origin != s ? HFR_CU_CAPTURE_UNMATCHED : c->broken ? HFR_CU_CAPTURE_INVALIDATED : HFR_CU_SUCCESS;
  for (struct CUstream_st *other = fake.streams; !r && other; other = other->next)
    for (int i = 0; other->capture == c && other != s && i < other->ntips; i++)
      if (!comes_before(other->tip[i], s->tip, s->ntips)) r = HFR_CU_CAPTURE_UNJOINED;
  if (c && c->origin == s) {
    for (struct CUstream_st *other = fake.streams; other; other = other->next)
      if (other->capture == c) leave(other);
    struct fake_capture **at = &fake.captures;
    while (*at != c) at = &(*at)->next;
    *at = c->next;
    *graph = r ? NULL : c->graph;
  }
  UNLOCK();
  return r;
}

EXPORT hfr_cu_result cuStreamGetCaptureInfo_v2(hfr_cu_stream stream, int *status, uint64_t *id, hfr_cu_graph *graph,
                                               const hfr_cu_node **nodes, size_t *count) {
  ENTER("cuStreamGetCaptureInfo");
  if (nodes || count) return HFR_CU_INVALID_VALUE;
  LOCK();
  struct CUstream_st *s = fake_stream(stream);
  hfr_cu_result r = s ? HFR_CU_SUCCESS : HFR_CU_INVALID_CONTEXT;
  if (s && s->destroyed) r = HFR_CU_INVALID_HANDLE;
  for (struct fake_capture *c = fake.captures; s && s == s->context->legacy && c; c = c->next)
    if (c->mode == HFR_CU_MODE_GLOBAL && !(c->origin->flags & HFR_CU_STREAM_NON_BLOCKING)) r = HFR_CU_CAPTURE_IMPLICIT;
  if (!r) {
    *status = !s->capture ? HFR_CU_CAPTURE_NONE : s->capture->broken ? HFR_CU_CAPTURE_BROKEN : HFR_CU_CAPTURE_ACTIVE;
    if (id) *id = s->capture ? s->capture->id : 0;
    if (graph) *graph = s->capture ? s->capture->graph : NULL;
  }
  UNLOCK();
  return r;
}

EXPORT hfr_cu_result cuStreamIsCapturing(hfr_cu_stream stream, int *status) {
  return cuStreamGetCaptureInfo_v2(stream, status, NULL, NULL, NULL, NULL);
}

/* ---------------------------------------------------------------- replay */

struct chain { /* what was captured on one stream runs in order; chains run beside each other */
  struct fake_exec *exec;
  struct CUstream_st *stream;
  pthread_t thread;
};

static void run_node(struct fake_exec *x, const struct fake_node *node) {
  LOCK();
  for (int i = 0; i < node->nafter; i++)
    while (!x->done[node->after[i]->index]) pthread_cond_wait(&fake.moved, &fake.lock);
  UNLOCK();
  fake_execute(&node->op);
  LOCK();
  x->done[node->index] = 1;
  pthread_cond_broadcast(&fake.moved);
  UNLOCK();
}

static void *run_chain(void *arg) {
  struct chain *c = arg;
  for (int i = 0; i < c->exec->graph->n; i++)
    if (c->exec->graph->node[i]->op.stream == c->stream) run_node(c->exec, c->exec->graph->node[i]);
  return NULL;
}

void fake_run_graph(struct fake_exec *x) {
  struct chain chain[64];
  struct CUgraph_st *g = x->graph;
  int n = 0;
  pthread_mutex_lock(&x->running);
  memset(x->done, 0, (size_t)g->n + 1);
  for (int i = 0; i < g->n && fake.one_queue; i++) run_node(x, g->node[i]);
  for (int i = 0; i < g->n && !fake.one_queue; i++) {
    int j = 0;
    while (j < n && chain[j].stream != g->node[i]->op.stream) j++;
    if (j < n) continue;
    if (n == 64) fake_die("a graph of more than 64 streams");
    chain[n++] = (struct chain){.exec = x, .stream = g->node[i]->op.stream};
  }
  for (int i = 1; i < n; i++)
    if (pthread_create(&chain[i].thread, NULL, run_chain, &chain[i])) fake_die("no thread for a graph");
  if (n) run_chain(&chain[0]);
  for (int i = 1; i < n; i++) pthread_join(chain[i].thread, NULL);
  pthread_mutex_unlock(&x->running);
}

EXPORT hfr_cu_result cuGraphInstantiateWithFlags(struct fake_exec **exec, hfr_cu_graph graph, unsigned long long flags) {
  ENTER_BLOCKING("cuGraphInstantiate");
  (void)flags;
  struct fake_exec *x = calloc(1, sizeof *x);
  LOCK();
  x->graph = calloc(1, sizeof *x->graph);
  x->graph->n = graph->n;
  x->graph->node = malloc((size_t)(graph->n + 1) * sizeof *graph->node);
  if (graph->n) memcpy(x->graph->node, graph->node, (size_t)graph->n * sizeof *graph->node);
  for (int i = 0; i < graph->nobjects; i++) {
    graph->object[i]->references++;
    hold(x->graph, graph->object[i]);
  }
  x->done = calloc((size_t)graph->n + 1, 1);
  pthread_mutex_init(&x->running, NULL);
  UNLOCK();
  *exec = x;
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuGraphLaunch(struct fake_exec *exec, hfr_cu_stream stream) {
  ENTER("cuGraphLaunch");
  if (exec->destroyed) fake_die("cuGraphLaunch: the executable graph was destroyed");
  LOCK();
  fake.launches++;
  struct CUstream_st *s = fake_stream(stream);
  hfr_cu_result r = fake_put(s, (struct fake_op){.what = FAKE_GRAPH, .exec = exec});
  UNLOCK();
  return r;
}

static void drop_all(struct CUgraph_st *g) {
  for (int i = 0; i < g->nobjects; i++) drop(g->object[i], 1);
  g->nobjects = 0;
}

EXPORT hfr_cu_result cuGraphDestroy(hfr_cu_graph graph) {
  ENTER("cuGraphDestroy");
  drop_all(graph);
  return HFR_CU_SUCCESS;
}

EXPORT hfr_cu_result cuGraphExecDestroy(struct fake_exec *exec) {
  ENTER("cuGraphExecDestroy");
  exec->destroyed = 1;
  pthread_mutex_lock(&exec->running); /* a launch that runs ends first */
  pthread_mutex_unlock(&exec->running);
  drop_all(exec->graph);
  return HFR_CU_SUCCESS;
}
