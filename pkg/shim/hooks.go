package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/pkg/internal/printable"
)

// hookTimeout bounds a hook that names no time of its own.
const hookTimeout = time.Minute

// runHooks runs hooks one after the other, with the container's state on their
// stdin, until one fails: on the host, whose mounts onHost leads to, see tree.
// https://github.com/opencontainers/runtime-spec/blob/v1.3.0/config.md#posix-platform-hooks
func runHooks(ctx context.Context, onHost func(func() error) error, kind string, hooks []specs.Hook, state specs.State) error {
	if len(hooks) == 0 {
		return nil
	}
	input, err := json.Marshal(state)
	if err != nil {
		return fmt.Errorf("%s hooks: %w", kind, err)
	}
	for _, h := range hooks {
		if err := onHost(func() error { return runHook(ctx, h, input) }); err != nil {
			return fmt.Errorf("%s hook %s: %w", kind, h.Path, err)
		}
	}
	return nil
}

// runPoststop runs all of the hooks for the end of a container. It does so
// whatever becomes of the caller: they undo what the first hooks did.
func runPoststop(ctx context.Context, onHost func(func() error) error, hooks []specs.Hook, state specs.State) {
	ctx = context.WithoutCancel(ctx)
	state.Status = specs.StateStopped
	for _, h := range hooks {
		if err := runHooks(ctx, onHost, "poststop", []specs.Hook{h}, state); err != nil {
			log.L.WithError(err).Warnf("container %s", state.ID)
		}
	}
}

func runHook(ctx context.Context, h specs.Hook, input []byte) error {
	timeout := hookTimeout
	if h.Timeout != nil && *h.Timeout > 0 {
		timeout = time.Duration(*h.Timeout) * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.Path)
	if len(h.Args) > 0 {
		cmd.Args = h.Args // with the program's name
	}
	cmd.Env = append([]string{}, h.Env...) // nothing of the shim's own
	cmd.Stdin = bytes.NewReader(input)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	// A child of the hook's may hold the output open.
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", err, ctx.Err())
		}
		if text := printable.String(output.String(), maxLine); text != "" {
			err = fmt.Errorf("%w: %s", err, text)
		}
		return err
	}
	return nil
}
