package agentclient

import (
	"context"

	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// CompareTime has the agent compare the guest's wall clock with the host's, and
// correct it. It waits for the answers as long as ctx lets it: one that comes
// late says less, but nothing wrong.
func (c *Client) CompareTime(ctx context.Context) error {
	earliest := timestamppb.Now()
	if _, err := c.rpc.NoteTime(ctx, &emptypb.Empty{}); err != nil {
		return err
	}
	latest := timestamppb.Now()
	if latest.AsTime().Before(earliest.AsTime()) {
		return nil // the host's was set meanwhile: the next time will do
	}
	_, err := c.rpc.CorrectTime(ctx, &agentproto.CorrectTimeRequest{Earliest: earliest, Latest: latest})
	return err
}
