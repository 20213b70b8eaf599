"""The trainer service: holds the tail, backpropagates through it, and keeps what devices are sent.

The rooms, each of which stands on those before it:

- storage/     what outlives the process: the database, the data folder's lock, the mirror of the devices' weights
- rounds/      a round and an evaluation as generators without I/O, and averages over devices
- tail/        the model's later layers: built, trained, kept as checkpoints, merged
- ranks/       the same tail on several processes (FSDP)
- runs/        the course of a run, its devices, and the line of runs
- simulation/  a whole fleet without sockets
- service/     the port: HTTP, the websocket, who may ask
- commands/    what people type

Threads. The event loop has the sockets, the devices and all decisions. Each run has one compute thread, which alone
touches its tail and its mirror. The database blocks, and is asked on other threads.

Where is it?

- The websocket's endpoint: DeviceRoutes._connect (service/device_routes.py), then Peer (runs/peer.py).
- What makes a round void: the head of rounds/algorithms.py; what follows of it: Coordinator._count_void.
- The tail's learning rate: `[tail]` in settings.py, applied in TailTrainer.step; the devices': `make_update` in
  rounds/algorithms.py. Both follow `schedule_factor` in hosl_protocol/run/settings.py.
- FSDP: ShardedTrainer (ranks/trainers.py).
- How a run resumes: the head of runs/resume.py tells the whole story.

The way of a value:

- A batch of activations: Peer._read and _sort (runs/peer.py), Fleet._first (runs/fleet.py), `batch_of`
  (rounds/exchange.py) in `_take_anchors` (rounds/algorithms.py), TailTrainer.forward_backward_many (tail/trainer.py).
- λ, back: TailTrainer._cut_gradient, `_cut_gradient` (rounds/algorithms.py), a Tell, Fleet.drive, Peer.tell and _put.
- An update: `make_update` (rounds/algorithms.py), Coordinator._commit_round, which moves the mirror, stores
  (Store.add_round) and sends it (Fleet.broadcast). For who was away: Admission._send_missed, from Store.updates.
- A Welcome: DeviceRoutes._lead_to_run, RunQueue.route, Admission._join, _bring_up and _welcome (runs/admission.py).

Where does one add

- a metric: metrics.py, and where it happens (Coordinator._report_round for a round's).
- an exit code: ExitCode in hosl_protocol/exceptions.py, and the error that ends with it in exceptions.py.
- a setting: settings.py, with its check in `_check`.
- an algorithm: its round in rounds/algorithms.py and in hosl_edge/step.py, both in a table ROUNDS; its name in
  hosl_protocol/run/settings.py (Algorithm); its messages in protocol/README.md.
- an operation of the HTTP API: service/runs_api.py.
"""
