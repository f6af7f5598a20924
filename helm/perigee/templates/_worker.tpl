{{/*
A pod with all ranks that a machine has of a replica: processes of one container. A container sees only the cards that it asks
for, and ranks whose cards do not see each other exchange activations through memory of the host instead of over NVLink: so
one container has all cards. `perigee-ranks` (deploy/images) starts the ranks, passes signals on, and ends with the first
that ends, since a replica lives and dies as a whole.
*/}}

{{/* Ranks of one machine. */}}
{{- define "perigee.ranks" -}}
{{- $worker := .Values.worker -}}
{{- if mod (int $worker.tp) (int $worker.machines) -}}
{{- fail (printf "worker.tp (%d) must be a multiple of worker.machines (%d)" (int $worker.tp) (int $worker.machines)) -}}
{{- end -}}
{{- div (int $worker.tp) (int $worker.machines) -}}
{{- end }}

{{/* Value of --device: with cuda, one card for each rank of the machine. */}}
{{- define "perigee.device" -}}
{{- if eq .Values.worker.device "cuda" -}}
cuda:{{ join "," (until (int (include "perigee.ranks" .))) }}
{{- else -}}
{{ .Values.worker.device }}
{{- end -}}
{{- end }}

{{- define "perigee.resources" -}}
{{- $resources := deepCopy .Values.worker.resources -}}
{{- $device := include "perigee.device" . -}}
{{- if hasPrefix "cuda" $device -}}
{{- $cards := trimPrefix "cuda:" $device | splitList "," | uniq | len -}}
{{- $resources = mergeOverwrite (dict "limits" (dict "nvidia.com/gpu" $cards)) $resources -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{/*
Takes (dict "root" . "name" N "host" H): the replica's name and its leader's host. Where a replica spans machines, its pods
differ only by the labels that the LeaderWorkerSet controller gives them.
*/}}
{{- define "perigee.workerPod" -}}
{{- $root := .root -}}
{{- $worker := $root.Values.worker -}}
{{- $spans := gt (int $worker.machines) 1 -}}
{{ include "perigee.podCommon" (list $root "worker") }}
terminationGracePeriodSeconds: {{ $worker.terminationGracePeriodSeconds }}
{{- with $worker.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $worker.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "perigee.modelInit" $root }}
{{ . | trim }}
{{- end }}
containers:
  - name: worker
    image: {{ include "perigee.image" (list $root (ternary "worker-cpu" "worker-cuda" (eq $worker.device "cpu"))) }}
    command: [perigee-ranks]
    args:
      - {{ include "perigee.ranks" $root | quote }}
      - {{ ternary "$(MACHINE)" "0" $spans | quote }}
      - --replica={{ .name }}
      - --tp={{ $worker.tp }}
      - --leader={{ ternary .host "127.0.0.1" $spans }}:7430
      {{- if $spans }}
      - --join-timeout=900
      {{- end }}
      - --model={{ include "perigee.model" $root }}
      - --device={{ include "perigee.device" $root }}
      {{- with $worker.dtype }}
      - --dtype={{ . }}
      {{- end }}
      {{- include "perigee.registryArguments" $root | nindent 6 }}
      - --advertise={{ .host }}
      - --grace={{ include "perigee.grace" $worker.terminationGracePeriodSeconds }}
      {{- with include "perigee.tracingArguments" $root }}
      {{- . | nindent 6 }}
      {{- end }}
      {{- with include "perigee.tlsArguments" $root }}
      {{- . | nindent 6 }}
      {{- end }}
      {{- if or (not $root.Values.tls.enabled) (and $spans (ne (include "perigee.device" $root) "cpu")) }}
      - --insecure
      {{- end }}
      {{- with $worker.extraArgs }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      # What follows is for the first rank of the machine.
      - --
      - --internal=0.0.0.0:7421
      - --listen=0.0.0.0:7422
      - --http=0.0.0.0:7423
    env:
      {{- include "perigee.logEnvironment" $root | nindent 6 }}
      - name: POD_NAME
        valueFrom:
          fieldRef:
            fieldPath: metadata.name
      {{- if $spans }}
      - name: REPLICA_INDEX
        valueFrom:
          fieldRef:
            fieldPath: metadata.labels['leaderworkerset.sigs.k8s.io/group-index']
      - name: MACHINE
        valueFrom:
          fieldRef:
            fieldPath: metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']
      {{- end }}
    ports:
      - name: internal
        containerPort: 7421
      - name: grpc
        containerPort: 7422
      - name: http
        containerPort: 7423
    {{- include "perigee.probes" $root | nindent 4 }}
    lifecycle:
      preStop:
        # Its sessions move to other replicas, and its ranks end. SIGTERM alone, from a node that cannot run this, does the same.
        exec:
          command: [perigee-ranks, drain]
    resources:
      {{- include "perigee.resources" $root | nindent 6 }}
    securityContext:
      {{- include "perigee.containerSecurity" $root | nindent 6 }}
    volumeMounts:
      - name: shared-memory
        mountPath: /dev/shm
      {{- include "perigee.mounts" $root | trim | nindent 6 }}
volumes:
  - name: shared-memory
    emptyDir:
      medium: Memory
      sizeLimit: {{ $worker.sharedMemory }}
  {{- include "perigee.volumes" $root | trim | nindent 2 }}
{{- end }}
